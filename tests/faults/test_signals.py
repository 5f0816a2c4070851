"""Ranks that are killed, and runs that are asked to stop: a handful of what the commands beside this do at length."""

from pathlib import Path

import pytest

from tests.faults.data import make_data
from tests.faults.kills import survive
from tests.faults.stops import stop_and_go_on

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
