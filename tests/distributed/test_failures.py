"""A rank that raises, dies or hangs ends the launch, and the output names it and the location it was at.

The faults occur concurrently, each in a launch of two forked tensor-parallel ranks; real launchers follow at the end.
`parallel.timeout_s` is what a hang costs.
"""

import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import pytest

from megatron_bipe.run_files import read_events
from megatron_bipe.runtime.launcher_env import Launch, Rendezvous
from megatron_bipe.train.metrics_file import record_failure
from tests.helpers.commands import options, run
from tests.helpers.faults import ProcessFault, faulty_pretrain
from tests.helpers.ranks import run_programs, run_ranks
from tests.helpers.tiers import selected, slow

TIMEOUT_S = 10
LAUNCHED_TIMEOUT_S = 90  # of ranks that import DeepSpeed first, which has taken more than 20 s on a loaded machine
HOST = socket.gethostname()
NAMES = [f"rank {rank} of 2 on {HOST} (stage 0, data 0, context 0, tensor {rank})" for rank in range(2)]
FAST = [("raise", 1), ("spin", 1), ("SIGKILL", 1), ("SIGSTOP", 1)]
SLOW = [("SIGKILL", 0), ("SIGSTOP", 0)]


class Failed(NamedTuple):
    """Result of a launch that has failed."""

    codes: list[int]
    outputs: list[str]  # of each rank
    recorded: list[tuple[int, str, str, str]]  # failures in events.jsonl: rank, location, reason, what it saw

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
        events = [event for event in read_events(work_dir / "run") if event["event"] == "failed"]
        recorded = [(event["rank"], event["at"], event["reason"], "\n".join(event.get("seen", []))) for event in events]
        return Failed([rank.code for rank in ranks], [rank.output for rank in ranks], recorded)

    with ThreadPoolExecutor(len(faults)) as pool:
        return dict(zip(faults, pool.map(launch, faults), strict=True))


@pytest.mark.parametrize("fault", [*FAST, *slow(SLOW)], ids=str)
def test_failure_ends_all_ranks_at_its_step(failed, fault):
    codes, outputs, _ = failed[fault]
    assert all(code != 0 for code in codes), outputs
    assert "step 2/1000" in outputs[0] and "step 3/1000" not in outputs[0], outputs[0]


def test_failure_rank_that_raises_is_named_with_its_traceback(failed):
    output = failed["raise", 1].output
    assert f"{NAMES[1]}, at step 3, failed:" in output, output
    assert "ValueError: an injected fault" in output and output.count("Traceback") == 1, output
    assert failed["raise", 1].recorded == [(1, "step 3", "ValueError: an injected fault", "")]


def test_failure_rank_that_is_killed_is_named_by_the_others(failed):
    assert f"{NAMES[1]}, last at " in failed["SIGKILL", 1].outputs[0], failed["SIGKILL", 1].output
    [(rank, _, _, seen)] = failed["SIGKILL", 1].recorded
    assert rank == 0 and f"No heartbeat: {NAMES[1]}" in seen


@pytest.mark.slow
def test_failure_rank_0_that_is_killed_ends_the_store(failed):
    output = failed["SIGKILL", 0].outputs[1]
    assert f"{NAMES[1]}, at step 3, micro-batch 1," in output, output
    assert re.search("store .* is gone", output), output
    [(rank, *_)] = failed["SIGKILL", 0].recorded
    assert rank == 1


def test_failure_rank_that_is_stopped_is_named_by_the_others(failed):
    output = failed["SIGSTOP", 1].outputs[0]
    [(rank, _, reason, seen)] = failed["SIGSTOP", 1].recorded
    assert rank == 0 and f"{TIMEOUT_S} s" in reason and f"No heartbeat: {NAMES[1]}" in seen
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
    from megatron_bipe.config import ParallelConfig
    from megatron_bipe.engine.base import start_deepspeed
    from megatron_bipe.runtime.distributed_init import connect_store
    from megatron_bipe.runtime.watchdog import BEAT_S, Watchdog

    start_deepspeed(mesh, 60)
    with Watchdog(mesh.with_layout(ParallelConfig()), 5 * BEAT_S, connect_store):
        time.sleep(0 if mesh.rank else 2 * BEAT_S)


def test_watchdog_waits_for_ranks_that_end_before_their_first_beat(tmp_path):
    assert len(run_ranks(leave_early, 2, tmp_path)) == 2


def fail_early(folder):
    """Fail on rank 1 before its first beat, while rank 0 waits for it."""
    from megatron_bipe.config import ParallelConfig
    from megatron_bipe.engine.base import start_deepspeed
    from megatron_bipe.errors import DataError
    from megatron_bipe.runtime.distributed_init import connect_store, join_launch
    from megatron_bipe.runtime.watchdog import Watchdog

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher would else end rank 0 first
    mesh = join_launch()
    start_deepspeed(mesh, 60)
    with Watchdog(mesh.with_layout(ParallelConfig()), 60, connect_store, partial(record_failure, folder)):
        if mesh.rank == 1:
            raise DataError("an injected fault", location="there")
        time.sleep(60)


def test_failure_before_the_first_beat_ends_the_others_and_is_on_record(tmp_path):
    ranks = run_programs(fail_early, [tmp_path], tmp_path, 2)
    assert [rank.code for rank in ranks] == [2, 2], ranks
    name = f"rank 1 of 2 on {HOST}"
    assert f"{name} (stage 0, data 1, context 0, tensor 0), at the start, failed first: DataError" in ranks[0].output
    [event] = read_events(tmp_path)
    assert (event["event"], event["rank"], event["at"]) == ("failed", 1, "the start")
    assert name in event["name"] and event["reason"].startswith("DataError: an injected fault"), event


def wait_for_rank_0(port):
    """Be rank 1 while rank 0, which has the store, is suspended: its connections are made, and nothing answers."""
    from megatron_bipe.runtime import watchdog
    from megatron_bipe.runtime.distributed_init import connect_store, join_launch

    watchdog.ANSWER_S = 1.0
    mesh = join_launch(Launch(1, 1, 2, 2, Rendezvous("127.0.0.1", port)))
    with watchdog.Watchdog(mesh, 2, connect_store):
        time.sleep(600)


def test_failure_store_that_hangs_before_the_first_beat_ends_the_others(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as suspended:
        [rank] = run_programs(wait_for_rank_0, [suspended.getsockname()[1]], tmp_path, time_limit_s=60)
    assert rank.code == 1
    assert re.search(r"rank 1 of 2 .* no progress for 2 s.*store .* does not answer", rank.output, re.DOTALL), rank


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
    given = arguments(text_dataset, tmp_path / "run", LAUNCHED_TIMEOUT_S)
    ended = run(*prefix, "tests.helpers.faults", *given, env=fault.variables)
    assert ended.code != 0 and not ended.left, ended.output
    assert f"{NAMES[1]}, {'at step 3' if kind == 'raise' else 'last at'}" in ended.output, ended.output
    assert ended.output.count("Traceback") <= 2, ended.output  # torchrun has its own
