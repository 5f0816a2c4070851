"""Simulated goodput against runs whose time is known."""

import random

import pytest

from megatron_bipe.estimate.goodput import Costs, daly_interval_s, estimate_goodput, goodput, simulate

COSTS = Costs(stall_s=2.0, detect_s=10.0, restart_s=30.0)


class Failures(random.Random):
    """Gives the times between failures in turn, and then none."""

    def __init__(self, *times_s):
        super().__init__(0)
        self.times_s = list(times_s)

    def expovariate(self, lambd=1.0):
        return self.times_s.pop(0) if self.times_s else 1e9


def test_simulate_without_failures_loses_the_stalls():
    assert simulate(100.0, 30.0, 0.0, COSTS, Failures()) == (100.0 + 4 * 2.0, 0)


@pytest.mark.parametrize(
    ("times_s", "wall_s", "failures"),
    [
        ((50.0,), 50.0 + 40.0 + 76.0, 1),  # after the first checkpoint, at 32 s
        ((10.0,), 10.0 + 40.0 + 108.0, 1),  # before it
        ((50.0, 20.0), 70.0 + 40.0 + 76.0, 2),  # again during the restart
    ],
)
def test_simulate_failure_costs_the_work_since_the_checkpoint_and_the_restart(times_s, wall_s, failures):
    assert simulate(100.0, 30.0, 0.0, COSTS, Failures(*times_s)) == (pytest.approx(wall_s), failures)


def test_daly_interval_is_near_the_best_of_its_multiples():
    assert daly_interval_s(2.0, 10_000.0) == pytest.approx(198.0)
    [found] = estimate_goodput([4], 400_000.0, 1 / 40_000, COSTS, trials=200, seed=0)
    assert (found.nodes, found.work_s, found.mean_time_s, found.interval_s) == (4, 100_000.0, 10_000.0, 198.0)
    assert found.share <= found.best_share < found.share + 0.005
    assert found.failures == pytest.approx(10, rel=0.2)


def test_goodput_is_the_same_for_the_same_seed():
    values = (10_000.0, 100.0, 1e-3, COSTS, 5)
    assert goodput(*values, 1) == goodput(*values, 1) != goodput(*values, 2)
