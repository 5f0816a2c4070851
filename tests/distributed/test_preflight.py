"""The preflight on ranks of one machine that stand for hosts; faults are inserted on single ranks."""

import json
import re
import socket
import time
from pathlib import Path

import pytest

import pretrain
from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime import distributed_init, host_facts, preflight, preflight_network, preflight_steps
from megatron_bipe.runtime.distributed_init import find_launch
from tests.helpers.commands import options
from tests.helpers.ranks import patience, run_ranks
from tests.helpers.tools import script

LIMIT_S = 4  # of a step that hangs; one that does not takes much less
SETTINGS = ("train.global_batch=12", "train.micro_batch=1", "checkpoint.min_free_gib=0")


def preflight_of(mesh, data, output, hosts, fault=None, limit_s=60):
    """Run the tool on this rank, as a rank of one of several hosts; return its exit code, or None if it is absent."""
    per_host = mesh.num_ranks // hosts
    host = f"host-{mesh.rank // per_host}"
    launch = find_launch()._replace(local_rank=mesh.rank % per_host, num_local_ranks=per_host)
    arguments = [*options(Path(data), Path(output) / "run" / "new", *SETTINGS), "--write-mib", "1"]
    arguments += ["--timeout-s", str(limit_s), "--json", f"{output}/report.json"]
    preflight_steps._SLACK_S = 0.5
    with pytest.MonkeyPatch.context() as patch, script("preflight") as tool:
        patch.setattr(socket, "gethostname", lambda: host)
        patch.setattr(preflight_network, "_SIZES_BYTES", {"cpu": (2**10, 2**12)})
        if fault is not None and fault(mesh.rank, patch, arguments) == "absent":
            return None
        return tool.preflight(tool.parse_args(["--ds_config", "ds_configs/zero1.json", *arguments]), launch)


def report_of(folder, num_ranks, **arguments):
    """Return the exit codes of all ranks, and the checks by name as the JSON file has them."""
    codes = run_ranks(preflight_of, num_ranks, folder / "ranks", output=str(folder), **arguments)
    report = json.loads((folder / "report.json").read_text())
    assert report["ranks"] == num_ranks
    return codes, {check["name"]: check for check in report["checks"]}


def test_preflight_of_a_sound_launch_passes(text_dataset, tmp_path):
    codes, checks = report_of(tmp_path, 4, data=str(text_dataset), hosts=2)
    assert codes == [0] * 4, checks
    skipped = {name for name, check in checks.items() if check["verdict"] == "not checked"}
    assert skipped == {"device memory"}
    assert list(checks["write rate"]["by_rank"]) == ["0", "2"]  # one rank of each host
    assert len(checks["within hosts, GB/s"]["by_rank"]["3"]) == 2
    assert not (tmp_path / "run").exists()  # nothing remains


def different(rank, patch, arguments):
    """Make ranks differ in everything that must be equal."""
    if rank == 1:
        version = host_facts.metadata.version
        patch.setattr(host_facts.metadata, "version", lambda name: "0.1" if name == "torch" else version(name))
        patch.setattr(preflight_network, "wall_clock_s", lambda: time.time() + 7)
        patch.setattr(host_facts, "device_fact", lambda mesh: "another device")
        patch.setenv("NCCL_ALGO", "Ring")
        arguments += ["--set", "optimizer.lr=0.5"]
    if rank == 2:
        patch.setattr(host_facts, "source_hash", lambda folder: "changed")
        open_dataset = host_facts.open_dataset
        patch.setattr(host_facts, "open_dataset", lambda path: open_dataset(f"{path}-other"))
        patch.setattr(preflight, "_write_in", denied)


def test_preflight_accepts_every_option_of_a_run(capsys):
    with pytest.raises(SystemExit):
        pretrain.parse_args(["--help"])
    given = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert len(given) >= 10
    with script("preflight") as tool:
        for option in sorted(given):
            tool.parse_args(["--ds_config", "zero1.json", option, "1"])


def denied(work, name):
    raise PermissionError(13, "Permission denied", str(work))


@pytest.fixture(scope="module")
def differing(tmp_path_factory, train_and_valid):
    """Return the exit codes and checks of a launch whose ranks differ."""
    folder = tmp_path_factory.mktemp("differing")
    for name, source in {"data": "train", "data-other": "valid"}.items():
        (folder / name).symlink_to(train_and_valid / source)
    return report_of(folder, 3, data=str(folder / "data"), hosts=3, fault=different)


@pytest.mark.parametrize(
    ("check", "shown"),
    [
        ("device", "another device on host-1 (rank 1)"),
        ("versions", "torch 2.* on host-0 (rank 0) and host-2 (rank 2), 0.1 on host-1 (rank 1)"),
        ("versions", "changed on host-2 (rank 2)"),
        ("configuration", "optimizer.lr 0.0001 on host-0 (rank 0) and host-2 (rank 2), 0.5 on host-1 (rank 1)"),
        ("environment", "NCCL_ALGO missing on host-0 (rank 0) and host-2 (rank 2), Ring on host-1 (rank 1)"),
        ("clock", "-* s on host-1 (rank 1)"),
        ("data", " on host-2 (rank 2)"),
        ("run folder", "permission denied"),
    ],
)
def test_preflight_names_the_ranks_that_differ(differing, check, shown):
    found = differing[1][check]
    assert found["verdict"] == "FAILED" and found["remedy"]
    at = 0
    for part in shown.lstrip("-").split("*"):
        at = found["seen"].find(part, at)
        assert at >= 0, found["seen"]


def test_preflight_fails_on_all_ranks_with_one_code(differing):
    codes, checks = differing
    assert codes == [1, 1, 1]
    assert {name for name, check in checks.items() if check["verdict"] == "FAILED"} == {
        *("device", "versions", "configuration", "environment", "clock", "data", "run folder")
    }


def absent(rank, patch, arguments):
    return "absent" if rank == 1 else None


def without_device(rank, patch, arguments):
    def refuse(launch):
        raise ConfigError("local rank 1 sees 1 GPUs")

    if rank == 1:
        patch.setattr(distributed_init, "join_launch", refuse)


def stuck(rank, patch, arguments):
    """Let a rank never reach the group that the others wait for."""
    if rank == 2:
        patch.setattr(preflight_network.Network, "start_host_group", lambda network: time.sleep(60))


def test_preflight_without_a_rank_ends_and_names_it(text_dataset, tmp_path):
    codes, checks = report_of(tmp_path, 3, data=str(text_dataset), hosts=3, fault=absent, limit_s=patience(LIMIT_S))
    assert codes == [1, None, 1]
    assert checks["ranks"]["verdict"] == "FAILED" and "(rank 1)" in checks["ranks"]["seen"]
    assert checks["process group"]["seen"] == "rank 1 did not answer"
    assert checks["versions"]["verdict"] == "ok"


def test_preflight_of_a_rank_without_a_device_reports_it_and_tries_no_network(text_dataset, tmp_path):
    codes, checks = report_of(tmp_path, 2, data=str(text_dataset), hosts=1, fault=without_device)
    assert codes == [1, 1]
    assert checks["device"]["verdict"] == "FAILED"
    assert "sees 1 GPUs. on host-0 (rank 1)" in checks["device"]["seen"]
    assert checks["process group"]["seen"] == "a rank has no device"


def test_preflight_ends_a_step_that_hangs_and_shows_what_each_rank_waits_for(text_dataset, tmp_path):
    codes, checks = report_of(tmp_path, 3, data=str(text_dataset), hosts=3, fault=stuck, limit_s=patience(LIMIT_S))
    assert codes == [1, 1, 1]
    seen = checks["host-side group"]["by_rank"]
    assert "connecting the host-side group" in seen["0"] and "connecting the host-side group" in seen["1"]
    assert "did not end within" in seen["2"] and "connecting" not in seen["2"]
    assert checks["process group"]["verdict"] == "ok"
    assert checks["all ranks, GB/s"]["verdict"] == "not checked"
