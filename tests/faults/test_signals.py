"""Killed ranks and stopped runs leave metrics and weights unchanged.

The first tests end forked ranks; the slow ones use torchrun and the supervisor, like the longer commands in this
folder do at length.
"""

import os
import random
import shutil
import sys
from pathlib import Path

import pytest

from megatron_bipe.run_files import read_events
from megatron_bipe.runtime.preemption import EXIT_RESUMABLE
from tests.faults.kills import survive
from tests.faults.stops import stop_and_resume
from tests.helpers.commands import run
from tests.helpers.faults import ProcessFault, faulty_pretrain
from tests.helpers.paths import BIN
from tests.helpers.ranks import Ended, run_programs
from tests.helpers.small_runs import LOCATIONS, arguments, differences, random_fault, signals_sent

STEPS, NUM_RANKS = 20, 2
KILLED = -9  # exit code
KILLED_AT = ("step", "checkpoint")
STOPPED_AT = ((2, "SIGTERM"),)  # numbers of LOCATIONS


def launch(data: Path, run_dir: Path, fault: ProcessFault | None = None) -> list[Ended]:
    """Start or resume a run with the fault."""
    variables = fault.variables if fault else {}
    settings = arguments(data, run_dir, steps=STEPS)
    return run_programs(faulty_pretrain, [settings], run_dir.with_name("logs"), NUM_RANKS, env=variables)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, train_and_valid: Path) -> Path:
    """Return the uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert {rank.code for rank in launch(train_and_valid, run_dir)} == {0}
    return run_dir


def test_killed_ranks_leave_no_trace_in_weights_and_metrics(
    uninterrupted: Path, train_and_valid: Path, tmp_path: Path
) -> None:
    run_dir, record, chance = tmp_path / "run", tmp_path / "killed.jsonl", random.Random(1)
    for location in KILLED_AT:
        number = [name for name, *_ in LOCATIONS].index(location)
        fault = random_fault(chance, "SIGKILL", number, NUM_RANKS, record)
        ranks = launch(train_and_valid, run_dir, fault)
        codes = [rank.code for rank in ranks]
        assert codes[fault.rank] == KILLED and 0 not in codes, ranks
    assert [kill["location"] for kill in signals_sent(record)] == list(KILLED_AT)
    assert {rank.code for rank in launch(train_and_valid, run_dir)} == {0}
    assert differences(run_dir, uninterrupted) == []


def test_stopped_run_saves_immediately_and_continues_like_an_uninterrupted_one(
    uninterrupted: Path, train_and_valid: Path, tmp_path: Path
) -> None:
    run_dir, record, chance = tmp_path / "run", tmp_path / "sent.jsonl", random.Random(2)
    for number, name in STOPPED_AT:
        fault = random_fault(chance, name, number, NUM_RANKS, record)
        ranks = launch(train_and_valid, run_dir, fault)
        assert [rank.code for rank in ranks] == [EXIT_RESUMABLE] * NUM_RANKS, ranks
        assert read_events(run_dir)[-1]["event"] == "stop"
    assert len(signals_sent(record)) == len(STOPPED_AT)
    assert {rank.code for rank in launch(train_and_valid, run_dir)} == {0}
    assert differences(run_dir, uninterrupted) == []


@pytest.mark.slow
def test_killed_ranks_under_the_supervisor_leave_no_trace(train_and_valid: Path, tmp_path: Path) -> None:
    outcome = survive(tmp_path, train_and_valid, len(LOCATIONS), NUM_RANKS, seed=1)
    assert outcome.killed.total() == len(LOCATIONS), outcome.output
    assert len({location for location, _ in outcome.killed}) == len(LOCATIONS)
    assert outcome.differences == [], outcome.output


@pytest.mark.slow
def test_stopped_run_under_torchrun_saves_immediately_and_continues(train_and_valid: Path, tmp_path: Path) -> None:
    outcome = stop_and_resume(tmp_path, train_and_valid, len(LOCATIONS), NUM_RANKS, 1)
    assert len(outcome.stops) == len(LOCATIONS)
    assert outcome.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "mpiexec"])
def test_stop_before_the_first_step_exits_with_a_code_that_launchers_forward(
    launcher, train_and_valid, tmp_path, free_port
):
    prefix = {
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())],
        "mpiexec": ["mpiexec", "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable],
    }[launcher]
    if shutil.which(prefix[0], path=f"{BIN}{os.pathsep}{os.environ['PATH']}") is None:
        pytest.skip(reason=f"there is no {prefix[0]}")
    ended = run(*prefix, "pretrain.py", "--stop-at", "0s", *arguments(train_and_valid, tmp_path, steps=4))
    assert ended.code == EXIT_RESUMABLE and not ended.left, ended.output
    assert [(event["event"], event["step"]) for event in read_events(tmp_path)] == [("start", 0), ("stop", 0)]
