"""The launch scripts of examples/: their files and options exist, and each trains two ranks of a small model."""

import json
import os
import re
import shutil
import socket
import stat
import subprocess

import pytest
from deepspeed.launcher import runner
from torch.distributed.run import get_args_parser

import pretrain
from megatron_bipe.config.load import load_run_config
from tests.helpers.commands import options, run
from tests.helpers.paths import BIN, ROOT
from tests.helpers.tools import script as script_of

SCRIPTS = ROOT / "examples" / "launch"
NAMES = ("one_machine.sh", "hostfile.sh", "slurm.sbatch", "mpi.sh", "torchrun.sh")
# Sets the variables that srun sets for the tasks of a step; srun's own options end where the program begins.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=localhost SLURM_NODEID=0
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "${code:-0}"
"""


def commands_of(name: str) -> str:
    """Return the lines of a script without comments, with continued lines joined."""
    text = re.sub(r"^\s*#.*$", "", (SCRIPTS / name).read_text(), flags=re.MULTILINE)
    return text.replace("\\\n", " ")


def launched(name: str, word: str) -> tuple[list[str], list[str]]:
    """Return the options that a script passes to its launcher, and those that it passes to pretrain.py."""
    command = re.search(rf"^exec (?:.* -- +)?{word} (.*)$", commands_of(name), re.MULTILINE)[1]
    before, after = command.split(" pretrain.py ")
    return [re.findall(r"(?<!\S)--?[a-z][\w-]*", part) for part in (before, after)]


@pytest.mark.parametrize("name", NAMES)
def test_launch_script_is_sound_bash_that_can_be_started(name):
    script = SCRIPTS / name
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & stat.S_IXUSR
    text = script.read_text()
    assert "set -euo pipefail" in text and text.rstrip().endswith('"$@"')


@pytest.mark.parametrize("name", NAMES)
def test_launch_script_passes_shellcheck(name):
    shellcheck = shutil.which("shellcheck", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip(reason="there is no shellcheck")
    done = subprocess.run([shellcheck, str(SCRIPTS / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_launch_script_names_files_that_exist(name):
    files = re.findall(r"(?:examples|ds_configs)/[\w./]*\w", (SCRIPTS / name).read_text())
    assert f"examples/launch/{name}" in files
    assert [file for file in files if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("name", NAMES)
def test_launch_script_gives_pretrain_options_that_it_has(name, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--ds_config", "a", "--config", "b"])
    word = {"slurm.sbatch": "srun", "mpi.sh": "mpiexec", "torchrun.sh": "torchrun"}.get(name, "deepspeed")
    given = launched(name, word)[1]
    assert given[:2] == ["--ds_config", "--config"]
    assert set(vars(pretrain.parse_args())) >= {option.lstrip("-") for option in given}


@pytest.mark.parametrize("name", ["one_machine.sh", "hostfile.sh"])
def test_launch_script_gives_deepspeed_options_that_it_has(name):
    given = launched(name, "deepspeed")[0]
    words = [word for option in given for word in (option, "1")]
    parsed = runner.parse_args([*words, "pretrain.py"])
    assert given and parsed.user_script == "pretrain.py"
    parsed = runner.parse_args(["--no_ssh", "--node_rank", "0", "pretrain.py"])  # as hostfile.sh says
    assert parsed.no_ssh and parsed.node_rank == 0


def test_launch_script_gives_torchrun_options_that_it_has():
    several = re.search(r"rendezvous=\((--nnodes.*)\)", commands_of("torchrun.sh"))[1]
    given = [*re.findall(r"--[a-z-]+", several), *launched("torchrun.sh", "torchrun")[0]]
    assert len(given) == 5
    get_args_parser().parse_args(["--standalone", *(word for option in given for word in (option, "1")), "pretrain.py"])


def test_launch_hostfile_is_one_that_deepspeed_reads():
    assert runner.fetch_hostfile(str(SCRIPTS / "hostfile")) == {"node-1": 8, "node-2": 8}


def test_launch_slurm_script_trains_on_300_billion_tokens():
    text = (SCRIPTS / "slurm.sbatch").read_text()
    sizes = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)", text, re.MULTILINE))
    assert int(sizes["nodes"]) * int(sizes["ntasks-per-node"]) == 64
    assert sizes["ntasks-per-node"] == sizes["gpus-per-node"]
    configs = sorted((ROOT / "examples").glob("*_1.6b.yaml"))
    assert len(configs) == 4 and ROOT / re.search(r"CONFIG:-(.*?)}", text)[1] in configs
    for config in configs:
        train = load_run_config(config).train
        tokens_a_step = train.global_batch * train.seq_len_tokens
        assert abs(train.steps * tokens_a_step - 300e9) < tokens_a_step
        assert train.global_batch % (64 * train.micro_batch) == 0


@pytest.mark.parametrize(("code", "queued"), [(75, True), (2, False)])
def test_launch_slurm_script_queues_the_job_again_that_was_asked_to_stop(code, queued, tmp_path):
    srun = f"[[ $* == *preflight.py* ]] || exit {code}"
    for name, script in {"srun": srun, "scontrol": f'echo "$@" >> {tmp_path}/called'}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHON": "python"}
    env |= {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(ROOT), "RUN_DIR": str(tmp_path / "run")}
    ended = run(str(SCRIPTS / "slurm.sbatch"), env=env)
    assert ended.code == code, ended.output
    called = tmp_path / "called"
    assert (called.read_text() if called.exists() else "") == ("requeue 17\n" if queued else "")


@pytest.mark.parametrize("logs", ["", "logs of ranks"])
def test_launch_slurm_script_labels_the_output_of_ranks_or_gives_each_a_file(logs, tmp_path):
    script = f'printf "%s|" "$@" >> {tmp_path}/calls\nexit 2\n'
    (tmp_path / "srun").write_text(f"#!/usr/bin/env bash\n{script}")
    (tmp_path / "srun").chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}", "PREFLIGHT": "0", "PYTHON": "python"}
    env |= {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(ROOT), "RUN_DIR": str(tmp_path / "run")}
    folder = str(tmp_path / logs) if logs else ""
    ended = run(str(SCRIPTS / "slurm.sbatch"), env=env | {"LOGS": folder})
    assert ended.code == 2, ended.output
    given = (tmp_path / "calls").read_text().partition("|python|")[0].split("|")
    expected = [f"--output={folder}/%x-%j-rank-%t.log", "--open-mode=append"] if logs else ["--label"]
    assert given[: len(expected)] == expected and all(option.startswith("--") for option in given)
    assert not logs or (tmp_path / logs).is_dir()


@pytest.mark.parametrize(("name", "launcher"), [("slurm.sbatch", "srun"), ("hostfile.sh", "deepspeed")])
@pytest.mark.parametrize(
    ("asked", "code", "started"),
    [("1", 1, ["preflight"]), ("1", 0, ["preflight", "pretrain"]), ("0", 1, ["pretrain"])],
)
def test_launch_script_trains_only_after_a_preflight_that_passes(name, launcher, asked, code, started, tmp_path):
    script = f'echo "$@" >> {tmp_path}/calls\n[[ $* == *preflight.py* ]] && exit {code}\nexit 2\n'
    (tmp_path / launcher).write_text(f"#!/usr/bin/env bash\n{script}")
    (tmp_path / launcher).chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}", "PREFLIGHT": asked}
    env |= {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(ROOT), "RUN_DIR": str(tmp_path / "run"), "PYTHON": "python"}
    ended = run(str(SCRIPTS / name), "--set", "train.steps=3", "--stop-step", "2", env=env)
    assert ended.code == (1 if started == ["preflight"] else 2), ended.output
    calls = [
        re.search(r"(preflight|pretrain)\.py (.*)", line) for line in (tmp_path / "calls").read_text().splitlines()
    ]
    assert [call[1] for call in calls] == started
    assert len({call[2] for call in calls}) == 1  # both have the same options
    with script_of("preflight") as tool:
        assert tool.parse_args(calls[0][2].split()).set[-1] == "train.steps=3"


@pytest.mark.parametrize(
    ("variables", "options"),
    [({}, ""), ({"GPUS": "2"}, "--num_gpus 2 "), ({"CUDA_VISIBLE_DEVICES": "4,5"}, "")],
)
def test_launch_one_machine_leaves_the_gpus_to_cuda_visible_devices(variables, options, tmp_path):
    (tmp_path / "deepspeed").write_text('#!/usr/bin/env bash\necho "got $CUDA_VISIBLE_DEVICES: $*"\n')
    (tmp_path / "deepspeed").chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "GPUS": "", "CUDA_VISIBLE_DEVICES": ""}
    ended = run(str(SCRIPTS / "one_machine.sh"), env=env | {"PORT": "2950"} | variables)
    visible = variables.get("CUDA_VISIBLE_DEVICES", "")
    assert f"got {visible}: {options}--master_port 2950 pretrain.py" in ended.output


@pytest.fixture
def echo(tmp_path):
    """Return a function that runs a launch script with launchers that print their arguments."""
    for name in ("deepspeed", "torchrun"):
        (tmp_path / name).write_text('#!/usr/bin/env bash\necho "got $*"\n')
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"
    return lambda script, **env: run(str(SCRIPTS / script), env={"PATH": path, "GPUS": "2", **env})


def test_launch_on_one_machine_chooses_a_free_port(echo):
    ports = {re.search(r"--master_port (\d+) ", echo("one_machine.sh").output)[1] for _ in range(2)}
    assert len(ports) == 2 and "29500" not in ports
    assert "got --standalone --nproc-per-node 2 pretrain.py" in echo("torchrun.sh").output


def test_launch_torchrun_on_a_port_in_use_is_refused_on_the_first_host_only(echo):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        refused = echo("torchrun.sh", NODES="2", PORT=port)
        assert refused.code == 2 and port in refused.output and "PORT" in refused.output
        second = echo("torchrun.sh", NODES="2", NODE_RANK="1", PORT=port, HEAD="node-1")
    options = f"--nnodes 2 --node-rank 1 --master-addr node-1 --master-port {port} --nproc-per-node 2"
    assert f"got {options} pretrain.py" in second.output
    assert f"--master-port {port}" in echo("torchrun.sh", PORT=port).output


def test_launch_one_machine_with_two_choices_of_gpus_is_refused():
    ended = run(str(SCRIPTS / "one_machine.sh"), env={"GPUS": "2", "CUDA_VISIBLE_DEVICES": "4,5"})
    assert ended.code == 2 and "GPUS=2" in ended.output and "CUDA_VISIBLE_DEVICES=4,5" in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_launch_script_trains_two_ranks(name, text_dataset, tmp_path, free_port):
    port, hosts = str(free_port()), tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    if name == "mpi.sh" and not (BIN / "mpiexec").exists() and not shutil.which("mpiexec"):
        pytest.skip(reason="there is no mpiexec")
    if name == "slurm.sbatch":
        (tmp_path / "srun").write_text(SRUN)
        (tmp_path / "srun").chmod(0o755)
    env = {
        "one_machine.sh": {"GPUS": "2"},
        "hostfile.sh": {"HOSTFILE": str(hosts), "HEAD": "127.0.0.1", "PORT": port}
        | {"LAUNCHER_OPTIONS": "--no_ssh --node_rank 0"},
        "slurm.sbatch": {"PATH": f"{tmp_path}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHON": "python"}
        | {"SLURM_JOB_ID": str(int(port)), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS": "64"}
        | {"RUN_DIR": str(tmp_path / "run")},
        "mpi.sh": {"RANKS": "2", "MPI_OPTIONS": "--oversubscribe"},
        "torchrun.sh": {"GPUS": "2"},
    }[name]
    run_dir = tmp_path / "run"
    ended = run(str(SCRIPTS / name), *options(text_dataset, run_dir), env=env)
    assert ended.code == 0 and not ended.left, ended.output
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    state = json.loads((run_dir / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["layout"]["ranks"] == 2
