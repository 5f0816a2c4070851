"""Simulate the goodput of a long run on clusters of many sizes, with the checkpoint interval of Young and Daly.

The last columns show the best of several multiples of that interval, as simulated.

Examples:
    python tools/goodput.py
    python tools/goodput.py --failures-per-node-day 0.017 --stall-s 0.3 --detect-s 610 --restart-s 120
"""

import argparse
import sys
from collections.abc import Sequence

from _cli import command
from megatron_bipe.errors import ConfigError
from megatron_bipe.estimate.goodput import DAY_S, Costs, estimate_goodput

NODES = (8, 16, 32, 64, 128, 256, 512, 1024)
MAY_BE_0 = ("stall_s", "detect_s", "restart_s", "seed")


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
    work_s, rate = given.tokens / tokens_per_node_s, given.failures_per_node_day / DAY_S
    for row in estimate_goodput(given.nodes, work_s, rate, costs, given.trials, given.seed):
        print(
            f"{row.nodes:6} {row.work_s / DAY_S:8.2f} {row.mean_time_s / 3600:9.1f} {row.failures:9.1f} "
            f"{row.interval_s:11.0f} {row.share:8.2%} {row.best_share:8.2%} {row.best_factor:g} x the interval"
        )


def _check(given: argparse.Namespace) -> None:
    for name, value in vars(given).items():
        for number in [value] if isinstance(value, int | float) else value:
            if not (number > 0 or (number == 0 and name in MAY_BE_0)):
                option = f"--{name.replace('_', '-')}"
                least = "0 or more" if name in MAY_BE_0 else "more than 0"
                raise ConfigError(f"{option} is {number}", remedy=f"Give {least}", location=option)


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
