"""Ranks that are killed, and runs that are asked to stop: a handful of what the commands beside this do at length."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from megatron_bipe.train.events import read_events
from megatron_bipe.train.stopping import CONTINUE_LATER
from tests.faults.data import make_data
from tests.faults.kills import survive
from tests.faults.stops import stop_and_go_on
from tests.helpers.commands import run
from tests.helpers.paths import BIN
from tests.helpers.small_runs import arguments

KILLS = STOPS = 5  # one at each kind of place


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def test_killed_ranks_leave_no_trace_in_weights_and_metrics(data, tmp_path):
    outcome = survive(tmp_path, data, KILLS, num_ranks=2, seed=1)
    assert outcome.killed.total() == KILLS, outcome.output
    assert len({place for place, _ in outcome.killed}) == KILLS
    assert outcome.differences == [], outcome.output


def test_stopped_run_saves_at_once_and_goes_on_as_if_nothing_had_been(data, tmp_path):
    outcome = stop_and_go_on(tmp_path, data, STOPS, 2, 1)
    assert len(outcome.stops) == STOPS
    assert outcome.problems == []


@pytest.mark.parametrize("launcher", ["deepspeed", "mpiexec"])
def test_stop_before_the_first_step_leaves_with_a_code_that_launchers_pass_on(launcher, data, tmp_path, free_port):
    prefix = {
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())],
        "mpiexec": ["mpiexec", "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable],
    }[launcher]
    if shutil.which(prefix[0], path=f"{BIN}{os.pathsep}{os.environ['PATH']}") is None:
        pytest.skip(reason=f"there is no {prefix[0]}")
    ended = run(*prefix, "pretrain.py", "--stop-at", "0s", *arguments(data, tmp_path, steps=4))
    assert ended.code == CONTINUE_LATER and not ended.left, ended.output
    assert [(event["event"], event["step"]) for event in read_events(tmp_path)] == [("start", 0), ("stop", 0)]
