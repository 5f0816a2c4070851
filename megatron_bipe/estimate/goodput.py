"""Checkpoints of a long run, and its simulated goodput: the time of the steps that are kept, divided by the total time.

This is the definition of `run/goodput` in metrics.jsonl, but validation, the first start and queues are not simulated,
so that of a real run is lower. A run of a given length is simulated on nodes that fail independently of each other. A
failure costs the work since the last checkpoint, the time until it is detected, and the time until the first step is
done again; a failure in that time restarts it. Saving stalls training for a while. A failed node is replaced within the
restart. The checkpoint interval follows the formula of Young and Daly.
"""

import math
import random
from typing import NamedTuple

from megatron_bipe.checkpoint.find import num_own_steps
from megatron_bipe.config import RunConfig
from megatron_bipe.estimate.memory import STATE_BYTES

HOUR_S = 3600.0
TRIALS = 200  # simulated runs for each figure
# Llama 3: 466 interruptions in 54 days on 2,048 nodes of 8 GPUs (arXiv 2407.21783, section 3.3.4).
NODE_MTBF_HOURS = 2048 * 54 * 24 / 466


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


def goodput(work_s: float, interval_s: float, rate: float, costs: Costs, trials: int = TRIALS) -> tuple[float, float]:
    """Return the mean goodput and the mean number of failures of simulated runs, the same for the same values."""
    found = [simulate(work_s, interval_s, rate, costs, random.Random(f"0/{n}")) for n in range(trials)]
    return sum(work_s / trial.wall_s for trial in found) / trials, sum(trial.failures for trial in found) / trials


class Assumptions(NamedTuple):
    """Facts about a cluster that no file of this project states."""

    node_mtbf_hours: float = NODE_MTBF_HOURS
    """Mean time between failures of one node."""
    detect_s: float = 60.0
    """From a failure to the end of the launch."""
    restart_s: float = 120.0
    """From there until the first step is done again."""
    stall_s: float = 1.0
    """Stall of training for a checkpoint that is written in the background."""
    write_gb_s: float = 5.0
    """Rate at which all ranks together write a checkpoint, in 1e9 bytes per second."""


class CheckpointPlan(NamedTuple):
    """Size and interval of a run's checkpoints, and the goodput that is expected with them."""

    num_bytes: int
    write_s: float
    stall_s: float
    mtbf_s: float
    """Mean time between failures of all nodes together."""
    interval_s: float
    """Time of steps between checkpoints that loses least."""
    save_every: int
    """The same in steps."""
    goodput: float
    """With that interval."""
    failures: float
    """Mean number during the run."""
    configured_goodput: float
    """With the interval of `train.save_every`."""


def plan_checkpoints(
    run: RunConfig, num_parameters: int, step_s: float, num_nodes: int, assumptions: Assumptions
) -> CheckpointPlan:
    """Return the checkpoints of a run whose steps take `step_s`.

    A checkpoint that is written in the background protects from a failure once it is complete, so a failure costs the
    steps of that time, too, and checkpoints cannot follow each other faster.
    """
    num_steps = max(1, num_own_steps(run))
    num_bytes, work_s = num_parameters * STATE_BYTES, num_steps * step_s
    write_s, mtbf_s = num_bytes / (assumptions.write_gb_s * 1e9), assumptions.node_mtbf_hours * HOUR_S / num_nodes
    in_background = run.checkpoint.asynchronous
    stall_s, delay_s = (assumptions.stall_s, write_s) if in_background else (write_s, 0.0)
    costs = Costs(stall_s, assumptions.detect_s, assumptions.restart_s + delay_s)
    interval_s = max(daly_interval_s(stall_s, mtbf_s), delay_s)
    save_every = min(num_steps, max(1, round(interval_s / step_s)))
    share, failures = goodput(work_s, save_every * step_s, 1 / mtbf_s, costs)
    configured_s = (run.train.save_every or num_steps) * step_s
    configured, _ = goodput(work_s, configured_s, 1 / mtbf_s, costs)
    return CheckpointPlan(num_bytes, write_s, stall_s, mtbf_s, interval_s, save_every, share, failures, configured)
