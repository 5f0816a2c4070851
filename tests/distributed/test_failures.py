"""A rank that raises, dies or hangs ends the launch, and the output names it and the location it was at.

The faults occur concurrently, each in a launch of two forked tensor-parallel ranks; real launchers follow at the end.
`parallel.timeout_s` is what a hang costs.
"""

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from tests.helpers.commands import options, run
from tests.helpers.faults import ProcessFault, faulty_pretrain
from tests.helpers.ranks import run_programs, run_ranks
from tests.helpers.tiers import selected, slow

TIMEOUT_S = 10
HOST = socket.gethostname()
NAMES = [f"rank {rank} of 2 on {HOST} (stage 0, data 0, context 0, tensor {rank})" for rank in range(2)]
FAST = [("raise", 1), ("spin", 1), ("SIGKILL", 1), ("SIGSTOP", 1)]
SLOW = [("SIGKILL", 0), ("SIGSTOP", 0)]


class Failed(NamedTuple):
    """Result of a launch that has failed."""

    codes: list[int]
    outputs: list[str]  # of each rank

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)


def arguments(data, run_dir, timeout_s=TIMEOUT_S):
    settings = options(data, run_dir, "parallel.tensor=2", f"parallel.timeout_s={timeout_s}", steps=1000)
    return ["--ds_config", "ds_configs/zero1.json", *settings]


@pytest.fixture(scope="module")
def failed(request, tmp_path_factory, text_dataset):
    """Run a launch for every fault, which occurs at step 3."""
    folder, faults = tmp_path_factory.mktemp("failed"), selected(request, "fault")

    def launch(fault):
        work_dir = folder / "-".join(map(str, fault))
        ranks = run_programs(
            faulty_pretrain,
            [arguments(text_dataset, work_dir / "run")],
            work_dir,
            2,
            env=ProcessFault(*fault, location="step 3").variables,
        )
        return Failed([rank.code for rank in ranks], [rank.output for rank in ranks])

    with ThreadPoolExecutor(len(faults)) as pool:
        return dict(zip(faults, pool.map(launch, faults), strict=True))


@pytest.mark.parametrize("fault", [*FAST, *slow(SLOW)], ids=str)
def test_failure_ends_all_ranks_at_its_step(failed, fault):
    codes, outputs = failed[fault]
    assert all(code != 0 for code in codes), outputs
    assert "step 2/1000" in outputs[0] and "step 3/1000" not in outputs[0], outputs[0]


def test_failure_rank_that_raises_is_named_with_its_traceback(failed):
    output = failed["raise", 1].output
    assert f"{NAMES[1]}, at step 3, failed:" in output, output
    assert "ValueError: an injected fault" in output and output.count("Traceback") == 1, output


def test_failure_rank_that_is_killed_is_named_by_the_others(failed):
    assert f"{NAMES[1]}, last at " in failed["SIGKILL", 1].outputs[0], failed["SIGKILL", 1].output


@pytest.mark.slow
def test_failure_rank_0_that_is_killed_ends_the_store(failed):
    output = failed["SIGKILL", 0].outputs[1]
    assert f"{NAMES[1]}, at step 3, micro-batch 1," in output, output
    assert re.search("store .* is gone", output), output


def test_failure_rank_that_is_stopped_is_named_by_the_others(failed):
    output = failed["SIGSTOP", 1].outputs[0]
    assert re.search(rf"{re.escape(NAMES[0])}, at step 3, micro-batch 1, .* {TIMEOUT_S} s", output), output
    assert f"{NAMES[1]}, last at " in output, output


@pytest.mark.slow
def test_failure_rank_0_that_is_stopped_stops_the_store(failed):
    output = failed["SIGSTOP", 0].outputs[1]
    assert re.search(rf"{re.escape(NAMES[1])}, at step 3, micro-batch 1, .* {TIMEOUT_S} s", output), output
    assert re.search("store .* does not answer", output), output


def test_failure_rank_in_an_endless_loop_is_at_another_location_than_the_others(failed):
    output = failed["spin", 1].output
    alone = rf"At step 3, in spin \(faults.py:\d+\): {re.escape(NAMES[1])}"
    assert re.search(alone, output), output
    for name, function in ((NAMES[0], "train_step"), (NAMES[1], "spin")):  # both ranks show their stacks
        assert re.search(rf"{re.escape(name)}, at step 3.*is in\n.*, in {function}\n", output, re.DOTALL | re.I), output


def leave_early(mesh):
    """Leave the watchdog's block, on rank 1 before its first beat."""
    from megatron_bipe.config.schema import ParallelConfig
    from megatron_bipe.engine.base import start_deepspeed
    from megatron_bipe.runtime.distributed_init import connect_store
    from megatron_bipe.runtime.watchdog import BEAT_S, Watchdog

    start_deepspeed(mesh, 60)
    with Watchdog(mesh.with_layout(ParallelConfig()), 5 * BEAT_S, connect_store):
        time.sleep(0 if mesh.rank else 2 * BEAT_S)


def test_watchdog_waits_for_ranks_that_end_before_their_first_beat(tmp_path):
    assert len(run_ranks(leave_early, 2, tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "kind"), [("torchrun", "raise"), ("deepspeed", "SIGKILL"), ("deepspeed", "SIGSTOP")]
)
def test_failure_under_a_launcher_names_the_rank_and_leaves_no_process(
    text_dataset, tmp_path, free_port, launcher, kind
):
    prefix = {
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m"],
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "--module"],
    }[launcher]
    fault = ProcessFault(kind, 1, "step 3")
    ended = run(*prefix, "tests.helpers.faults", *arguments(text_dataset, tmp_path / "run", 20), env=fault.variables)
    assert ended.code != 0 and not ended.left, ended.output
    assert f"{NAMES[1]}, {'at step 3' if kind == 'raise' else 'last at'}" in ended.output, ended.output
    assert ended.output.count("Traceback") <= 2, ended.output  # torchrun has its own
