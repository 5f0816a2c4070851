"""Simulate the goodput of a long run on clusters of many sizes, with the checkpoint interval of Young and Daly.

A run of a given length is simulated on N nodes that fail independently of each other. A failure costs the work since
the last checkpoint, the time until it is detected, and the time until the first step is done again; a failure in that
time restarts it. Saving stalls training for a while. A failed node is replaced within the restart. The checkpoint
interval follows the formula of Young and Daly; the last columns show the best of several multiples of it, as simulated.

Examples:
    python tools/goodput.py
    python tools/goodput.py --failures-per-node-day 0.017 --stall-s 0.3 --detect-s 610 --restart-s 120
"""

import argparse
import math
import random
import sys
from collections.abc import Sequence
from typing import NamedTuple

from _cli import command
from megatron_bipe.errors import ConfigError

DAY_S = 86400.0
NODES = (8, 16, 32, 64, 128, 256, 512, 1024)
FACTORS = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)  # multiples of the formula's interval


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


@command
def main(argv: Sequence[str] | None) -> None:
    given = _parser().parse_args(argv)
    _check(given)
    costs = Costs(given.stall_s, given.detect_s, given.restart_s)
    tokens_per_node_s = given.gpus_per_node * given.flops_per_gpu * given.mfu / (6 * given.parameters)
    print(f"{given.tokens:.3g} tokens, {given.parameters:.3g} parameters, {tokens_per_node_s:,.0f} tokens/s per node")
    print(
        f"failures per node and day {given.failures_per_node_day:.4f}; stall {costs.stall_s:g} s, "
        f"detection {costs.detect_s:g} s, restart {costs.restart_s:g} s; means of {given.trials} runs"
    )
    print(f"{'nodes':>6} {'days':>8} {'MTBF h':>9} {'failures':>9} {'interval s':>11} {'goodput':>8} {'best':>8} at")
    for nodes in given.nodes:
        work_s = given.tokens / (tokens_per_node_s * nodes)
        rate = given.failures_per_node_day * nodes / DAY_S
        formula_s = daly_interval_s(costs.stall_s, 1 / rate)
        row = {factor: goodput(work_s, formula_s * factor, rate, costs, given.trials, given.seed) for factor in FACTORS}
        best = max(row, key=lambda factor: row[factor][0])
        share, failures = row[1.0]
        print(
            f"{nodes:6} {work_s / DAY_S:8.2f} {1 / rate / 3600:9.1f} {failures:9.1f} {formula_s:11.0f} {share:8.2%} "
            f"{row[best][0]:8.2%} {best:g} x the interval"
        )


def _check(given: argparse.Namespace) -> None:
    values = {name: [value] if isinstance(value, int | float) else value for name, value in vars(given).items()}
    may_be_0 = ("stall_s", "detect_s", "restart_s", "seed")
    bad = [
        f"--{name.replace('_', '-')} {value}"
        for name, each in values.items()
        for value in each
        if not (value > 0 or (value == 0 and name in may_be_0))
    ]
    if bad:
        raise ConfigError(f"{', '.join(bad)}: times may be 0, others must be above 0", location="tools/goodput.py")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--nodes", type=int, nargs="+", default=NODES, help="(default: %(default)s)")
    add("--tokens", type=float, default=300e9, help="of training (default: %(default)g)")
    add("--parameters", type=float, default=1.6e9, help="of the model (default: %(default)g)")
    add("--gpus-per-node", type=int, default=8, help="(default: %(default)s)")
    add("--flops-per-gpu", type=float, default=989e12, help="peak (default: H100, bf16, %(default)g)")
    add("--mfu", type=float, default=0.4, help="share of the peak (default: %(default)s)")
    add(
        "--failures-per-node-day",
        type=float,
        default=466 / 54 / 2048,
        help="(default: %(default).4f, Llama 3: 466 interruptions in 54 days on 2,048 nodes of 8 GPUs)",
    )
    add("--stall-s", type=float, default=1.0, help="stall of training per checkpoint (default: %(default)s)")
    add("--detect-s", type=float, default=60.0, help="from a failure to the end of the launch (default: %(default)s)")
    add("--restart-s", type=float, default=120.0, help="from there to the first step (default: %(default)s)")
    add("--trials", type=int, default=1000, help="simulated runs per figure (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
