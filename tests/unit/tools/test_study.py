"""The steps of a study and the ends of its command; stand-ins train and evaluate."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from megatron_bipe.errors import BipeError, ConfigError
from megatron_bipe.study import load_plan
from tests.helpers.errors import raises
from tests.helpers.paths import ROOT
from tests.helpers.tools import assert_refuses, call_tool, script
from tests.unit.study.conftest import *  # noqa: F403

# Writes the folder of a run as pretrain.py does; `fails` names a run that fails.
TRAIN = """
import pathlib, sys, yaml
run = yaml.safe_load(pathlib.Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
for key, _, value in (sys.argv[i + 1].partition("=") for i, word in enumerate(sys.argv) if word == "--set"):
    section, _, name = key.rpartition(".")
    (run.setdefault(section, {}) if section else run)[name] = yaml.safe_load(value)
here, run_dir = pathlib.Path(__file__).parent, pathlib.Path(run["run_dir"])
with (here / "trained").open("a") as file:
    file.write(f"{run_dir.relative_to(here / 'out' / 'runs')}\\n")
run_dir.mkdir(parents=True, exist_ok=True)
(run_dir / "config.yaml").write_text(yaml.safe_dump(run))
if (here / "fails").exists() and (here / "fails").read_text() in str(run_dir):
    sys.exit("no memory")
(run_dir / "checkpoints" / f"step-{run['train']['steps']:08d}").mkdir(parents=True)
"""
EVALUATE = """
import pathlib, sys
output, lengths = (sys.argv[sys.argv.index(f"--{name}") + 1] for name in ("output", "lengths"))
pathlib.Path(output).mkdir(parents=True, exist_ok=True)
rows = [f"v,m,{length},{document},{2.5 * len(output)},10" for length in lengths.split(",") for document in (0, 1)]
text = "\\n".join(["subset,model,length_tokens,document,nats,num_predictions", *rows])
(pathlib.Path(output) / "documents.csv").write_text(text)
"""


@pytest.fixture(scope="module")
def study():
    with script("study") as module:
        yield module


@pytest.fixture
def given(write_study, tmp_path, text_dataset, monkeypatch):
    """A study on existing data whose runs and evaluations are stand-ins; returns its file and its output."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    launch = {"command": shlex.join([sys.executable, str(tmp_path / "train.py")])}
    settings = {"data.path": str(text_dataset)}

    def write(**changes):
        path = write_study(launch=launch, data=None, **changes)
        base = (tmp_path / "base.yaml").read_text()
        data = f"data: {{path: {settings['data.path']}, valid_path: {tmp_path / 'valid'}}}\n"
        (tmp_path / "base.yaml").write_text(base + data)
        return path

    (tmp_path / "valid").symlink_to(text_dataset)
    words = [sys.executable, str(tmp_path / "evaluate.py")]
    monkeypatch.setattr("subprocess.Popen", _with_evaluation(words))
    return write


def _with_evaluation(words):
    """Return a `Popen` that runs these words in the position of `python tools/evaluate.py`."""
    from subprocess import Popen

    class Replaced(Popen):
        def __init__(self, command, *rest, **more):
            position = next((i for i, word in enumerate(command) if word == "tools/evaluate.py"), None)
            if position is not None:
                command = [*command[: position - 1], *words, *command[position + 1 :]]
            super().__init__(command, *rest, **more)

    return Replaced


def trained(tmp_path):
    return sorted((tmp_path / "trained").read_text().splitlines())


def run(path, *options, code=0):
    return call_tool("study", path, "--output", path.parent / "out", "--at-once", 2, *options, code=code).output


def test_data_is_made_once_and_segmented_again_for_each_rule(study, write_study):
    grid = {"model.encoding": ["rope", "bipe_rope"], "data.segments": ["sentence", "fixed:16"]}
    corpus = {"corpus": {"max_bytes": 99, "vocab_size": 50}}
    plan = load_plan(write_study(grid=grid, data=corpus))
    steps = [step for stage in study.data_stages(plan, Path("some where")) for step in stage]
    commands = [shlex.join(step.command) for step in steps]
    assert [str(step.result) for step in steps] == [
        "some where/raw/valid.jsonl.zst",
        "some where/tokenizer/tokenizer.json",
        "some where/data/sentence/train/manifest.json",
        "some where/data/sentence/valid/manifest.json",
        "some where/data/fixed-16/train/manifest.json",
        "some where/data/fixed-16/valid/manifest.json",
    ]
    assert commands[0].endswith("--max-bytes 99") and "--vocab-size 50 " in commands[1]
    assert commands[2].endswith("--output 'some where/data/sentence/train' --workers 2 --segments sentence")
    assert commands[5] == (
        "python tools/inspect_data.py resegment 'some where/data/sentence/valid' --segments fixed:16 "
        "--output 'some where/data/fixed-16/valid'"
    )


def test_runs_have_all_settings_and_evaluations_the_last_checkpoint(study, write_study):
    plan = load_plan(write_study(set={"optimizer.betas": [0.9, 0.95]}), ["train.log_every=7"])
    training, evaluation = (stage[1] for stage in study.run_stages(plan, plan.jobs(Path("out"))))
    words = training.command
    assert words[:5] == ["OMP_NUM_THREADS=1", "python", "pretrain.py", "--ds_config", "ds_configs/zero1.json"]
    assert [words[i + 1] for i, word in enumerate(words) if word == "--set"] == [
        "run_dir=out/runs/bipe_rope/seed-1",
        "optimizer.betas=[0.9, 0.95]",
        "model.encoding=bipe_rope",
        "train.log_every=7",
        "train.seed=1",
        "data.path=out/data/reference/train",
        "data.valid_path=out/data/reference/valid",
    ]
    assert training.result == evaluation.needs == Path("out/runs/bipe_rope/seed-1/checkpoints/step-00000004")
    assert training.needs == Path("out/data/reference/train/manifest.json")
    words = evaluation.command
    assert words[words.index("--models") + 1] == "out/runs/bipe_rope/seed-1@4"
    assert words[words.index("--lengths") + 1] == "16,32"
    for step in (training, evaluation):
        assert (ROOT / next(word for word in step.command if word.endswith(".py"))).is_file()


def test_runs_on_a_gpu_are_launched_by_deepspeed_one_at_a_time(study, write_study, monkeypatch):
    plan = load_plan(write_study(launch={"ranks": 2}), ["train.micro_batch=2"])
    assert study.train_step(plan, plan.jobs(Path("out"))[0]).command[:4] == [
        "deepspeed",
        "--quiet",
        "--num_accelerators",
        "2",
    ]
    monkeypatch.setattr(study.os, "sched_getaffinity", lambda _: range(9))
    monkeypatch.setattr(study, "uses_gpu", lambda: False)
    assert study.runs_at_once(plan) == 4
    monkeypatch.setattr(study, "uses_gpu", lambda: True)
    assert study.runs_at_once(plan) == 1
    plan = load_plan(write_study())
    assert study.train_step(plan, plan.jobs(Path("out"))[0]).command[0] == "deepspeed"


def test_study_trains_all_evaluates_all_and_adds_seeds_and_values(given, tmp_path):
    output = run(given(seeds=[1]))
    assert trained(tmp_path) == ["bipe_rope/seed-1", "rope/seed-1"]
    assert "| `bipe_rope` | `rope` |" in output
    names = ("results.csv", "differences.csv", "table.md", "perplexity.png", "study.html")
    assert all((tmp_path / "out" / name).is_file() for name in names)
    more = {"model.encoding": ["alibi", "rope", "bipe_rope"]}
    run(given(seeds=[1, 2], grid=more))
    expected = [f"{name}/seed-{seed}" for name in more["model.encoding"] for seed in (1, 2)]
    assert trained(tmp_path) == sorted(expected)
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()[1:]
    assert len(rows) == 2 * len(expected)


def test_study_refuses_a_changed_setting_before_it_runs_anything(given, tmp_path):
    run(given(seeds=[1]))
    path = given(seeds=[1, 2], set={"optimizer.lr": 0.5})
    arguments = [path, "--output", tmp_path / "out"]
    assert_refuses("study", arguments, ConfigError, "rope/seed-1: optimizer.lr", "bipe_rope/seed-1", 0.5)
    assert trained(tmp_path) == ["bipe_rope/seed-1", "rope/seed-1"]


def test_study_refuses_other_evaluation_settings(given, tmp_path):
    run(given(seeds=[1]))
    arguments = [given(seeds=[1], evaluate={"multiples": [1]}), "--output", tmp_path / "out"]
    assert_refuses("study", arguments, BipeError, "--lengths 16", "--lengths 16,32")


def test_run_that_fails_does_not_end_the_others_and_is_missing(given, tmp_path):
    path = given(seeds=[1, 2])
    (tmp_path / "fails").write_text("/rope/seed-1")
    output = run(path, code=2)
    assert "rope/seed-1 (not finished)" in output and "exit code 1" in output and "no memory" in output
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 1 + 3 * 2
    (tmp_path / "fails").unlink()
    run(path)
    assert trained(tmp_path).count("rope/seed-1") == 2 and len(trained(tmp_path)) == 5


def test_no_train_evaluates_what_is_done_and_lists_what_is_missing(given, tmp_path):
    run(given(seeds=[1]), "--member", "rope/seed-1")
    output = run(given(seeds=[1]), "--no-train", code=1)
    assert trained(tmp_path) == ["rope/seed-1"]
    assert "Without results: bipe_rope/seed-1 (not started)" in output


def test_only_keeps_members(given, tmp_path):
    run(given(seeds=[1]), "--only", "bipe_rope")
    assert trained(tmp_path) == ["bipe_rope/seed-1"]


def test_dry_run_lists_members_and_commands_and_runs_nothing(given, tmp_path):
    output = run(given(seeds=[1]), "--dry-run")
    assert "bipe_rope: lengths 16, 32, compared with rope" in output
    assert output.count("$ ") == 4 and "train.seed=1" in output
    assert not (tmp_path / "out").exists()


def test_member_that_does_not_exist_is_refused(given, tmp_path):
    arguments = [given(), "--output", tmp_path / "out", "--member", "rope/seed-9"]
    assert_refuses("study", arguments, ConfigError, "rope/seed-9", "rope/seed-1", location="--member")


@pytest.mark.slow
def test_slurm_trains_each_run_in_a_task_and_then_shows_the_results(given, tmp_path, monkeypatch):
    """A stand-in for sbatch runs all tasks at once, in their own processes, where the real evaluation then fails."""
    folder = tmp_path / "bin"
    folder.mkdir()
    start = "for task in 0 1; do echo $task >> {0}/tasks; SLURM_ARRAY_TASK_ID=$task bash $3 > {0}/$task.log 2>&1 & done"
    programs = {"sbatch": f"{start.format(tmp_path)}; wait; echo 5", "squeue": "true"}
    for name, text in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{sys.exec_prefix}/bin:/usr/bin:/bin")
    path = given(seeds=[3])
    output = run(path, "--slurm", "partition=gpu", "exclusive", code=1)
    assert "SLURM job 5" in output and (tmp_path / "tasks").read_text().split() == ["0", "1"]
    assert trained(tmp_path) == ["bipe_rope/seed-3", "rope/seed-3"], (tmp_path / "0.log").read_text()
    script = (tmp_path / "out" / "slurm" / "array.sbatch").read_text().splitlines()
    assert {"#SBATCH --partition=gpu", "#SBATCH --exclusive"} <= set(script)
    assert json.loads((tmp_path / "out" / "slurm" / "submitted.json").read_text())["job"] == "5"
    (folder / "squeue").write_text("#!/usr/bin/env bash\necho 5_0 R\n")
    assert "still queued" in run(path, "--slurm", code=1)
    output = run(path, "--no-train")
    assert "| `bipe_rope` | `rope` |" in output
    assert "Submitted" not in run(path, "--slurm")


def test_step_after_one_that_failed_is_an_error(study, tmp_path):
    step = study.Step("Evaluate", ["true"], tmp_path / "made", needs=tmp_path / "absent")
    with raises(BipeError, "Evaluate", tmp_path / "absent"):
        study.run_steps([[step]], tmp_path)
