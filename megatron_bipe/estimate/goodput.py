"""Simulated goodput of a long run: the share of its time that goes into steps that are kept.

A run of a given length is simulated on nodes that fail independently of each other. A failure costs the work since the
last checkpoint, the time until it is detected, and the time until the first step is done again; a failure in that
time restarts it. Saving stalls training for a while. A failed node is replaced within the restart. The checkpoint
interval follows the formula of Young and Daly.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

DAY_S = 86400.0
FACTORS = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)  # simulated intervals, as multiples of the formula's


class Costs(NamedTuple):
    """Times of interruptions and checkpoints, in seconds."""

    stall_s: float  # stall of training per checkpoint
    detect_s: float  # from a failure to the end of the launch
    restart_s: float  # from there until the first step is done again


class Trial(NamedTuple):
    """Result of a simulated run."""

    wall_s: float
    failures: int


def simulate(work_s: float, interval_s: float, failures_per_s: float, costs: Costs, chance: random.Random) -> Trial:
    """Simulate a run of `work_s` of steps, with a checkpoint after every `interval_s` of them.

    The times between failures of the full cluster are exponential.
    """
    wall_s, done_s, failures = 0.0, 0.0, 0
    next_failure_s = chance.expovariate(failures_per_s)
    while done_s < work_s:
        part_s = min(interval_s, work_s - done_s)
        if wall_s + part_s + costs.stall_s <= next_failure_s:
            wall_s, done_s = wall_s + part_s + costs.stall_s, done_s + part_s
            continue
        up = False
        while not up:  # a failure before the first step is done again repeats the restart
            failures += 1
            wall_s = next_failure_s + costs.detect_s + costs.restart_s
            next_failure_s += chance.expovariate(failures_per_s)
            up = next_failure_s > wall_s
            if not up:
                next_failure_s = max(next_failure_s, wall_s - costs.restart_s)
    return Trial(wall_s, failures)


def daly_interval_s(stall_s: float, mean_time_s: float) -> float:
    """Return the time of steps between checkpoints that loses least, by Young and Daly's formula to first order.

    `mean_time_s` is the mean time between failures of the full cluster.

    Source: Young 1974; Daly 2006, "A higher order estimate of the optimum checkpoint interval", equation 20 without its
        higher terms.
    """
    return max(1.0, math.sqrt(2 * stall_s * mean_time_s) - stall_s)


def goodput(work_s: float, interval_s: float, rate: float, costs: Costs, trials: int, seed: int) -> tuple[float, float]:
    """Return the mean goodput and the mean number of failures of simulated runs."""
    found = [simulate(work_s, interval_s, rate, costs, random.Random(f"{seed}/{n}")) for n in range(trials)]
    return sum(work_s / trial.wall_s for trial in found) / trials, sum(trial.failures for trial in found) / trials


class Estimate(NamedTuple):
    """Goodput of a run on one number of nodes."""

    nodes: int
    work_s: float  # time of all steps
    mean_time_s: float  # between failures of the full cluster
    failures: float  # mean number per run
    interval_s: float  # by the formula of Young and Daly
    share: float  # goodput at that interval
    best_share: float
    best_factor: float  # multiple of the interval with the best goodput


def estimate_goodput(
    nodes: Sequence[int], node_work_s: float, failures_per_node_s: float, costs: Costs, trials: int, seed: int
) -> Iterator[Estimate]:
    """Simulate a run on clusters of several sizes.

    Args:
        nodes: numbers of nodes.
        node_work_s: time of all steps on one node.
        failures_per_node_s: failures of a node per second.
        costs: times of interruptions and checkpoints.
        trials: simulated runs for each figure.
        seed: seed of the failures.
    """
    for count in nodes:
        work_s, rate = node_work_s / count, failures_per_node_s * count
        formula_s = daly_interval_s(costs.stall_s, 1 / rate)
        found = {factor: goodput(work_s, formula_s * factor, rate, costs, trials, seed) for factor in FACTORS}
        best = max(found, key=lambda factor: found[factor][0])
        share, failures = found[1.0]
        yield Estimate(count, work_s, 1 / rate, failures, formula_s, share, found[best][0], best)
