"""Simulated goodput against runs whose time is known, and the interval between checkpoints."""

import random

import pytest

from megatron_bipe.config import load_run_config
from megatron_bipe.estimate.goodput import Assumptions, Costs, daly_interval_s, goodput, plan_checkpoints, simulate

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
    interval_s = daly_interval_s(2.0, 10_000.0)
    assert interval_s == pytest.approx(198.0)
    shares = {
        factor: goodput(100_000.0, factor * interval_s, 1e-4, COSTS) for factor in (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)
    }
    assert shares[1.0][0] <= max(share for share, _ in shares.values()) < shares[1.0][0] + 0.005
    assert shares[1.0][1] == pytest.approx(10, rel=0.2)
    assert shares[0.25][0] < shares[1.0][0] > shares[4.0][0]


STEP_S, PARAMETERS = 2.0, 1_000_000_000  # 12 GB of state


def planned(*settings, num_nodes=4, **assumptions):
    run = load_run_config(None, ["train.steps=50000", "train.save_every=5", *settings])
    return plan_checkpoints(run, PARAMETERS, STEP_S, num_nodes, Assumptions(**{"node_mtbf_hours": 40.0} | assumptions))


def test_checkpoints_are_as_far_apart_as_the_formula_says_and_better_than_the_configured_ones():
    found = planned(stall_s=2.0)
    assert (found.num_bytes, found.write_s, found.mtbf_s) == (12e9, 2.4, 36_000.0)
    assert found.interval_s == daly_interval_s(2.0, 36_000.0) and found.save_every == round(found.interval_s / STEP_S)
    assert found.configured_goodput < 0.85 < found.goodput < 1  # 2 s of stall for 10 s of steps
    assert found.failures == pytest.approx(100_000 / 36_000, rel=0.2)
    assert planned(num_nodes=16).interval_s < found.interval_s


def test_checkpoints_that_training_waits_for_stall_it_while_they_are_written():
    waiting = planned("checkpoint.asynchronous=false", write_gb_s=0.1)
    assert waiting.stall_s == waiting.write_s == 120.0
    assert waiting.interval_s == daly_interval_s(120.0, 36_000.0)


def test_checkpoints_in_the_background_follow_each_other_no_faster_than_they_are_written():
    slow = planned(write_gb_s=0.01)
    assert slow.interval_s == slow.write_s == 1200.0 and slow.stall_s == 1.0
    assert slow.goodput < planned(write_gb_s=100.0).goodput  # steps during the write are lost, too


def test_checkpoints_only_at_the_end_lose_everything_before():
    assert planned("train.save_every=0").configured_goodput < planned().goodput
