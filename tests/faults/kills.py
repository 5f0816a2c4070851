"""Kill ranks of a supervised run repeatedly, and compare it with an uninterrupted run.

    python -m tests.faults.kills --count 50

Each kill is SIGKILL to one rank drawn at random, at a random moment after it reached one of these locations in
turn: the start, loading, training, validation, writing a checkpoint. The supervisor starts the launch again, without
any manual step. In the end every line of metrics.jsonl, all losses in TensorBoard, the weights and the moments must
be bit-identical to those of the uninterrupted run, which holds on a CPU. Exit code 1 where they are not, or where a
kill did not happen.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.helpers.commands import run
from tests.helpers.datasets import write_train_and_valid
from tests.helpers.ranks import free_port
from tests.helpers.small_runs import arguments, differences, launcher, random_fault, signals_sent, supervised

STEPS_A_KILL, LAST_STEPS = 4, 10


class Outcome(NamedTuple):
    """Kills that happened, and differences of the two runs."""

    killed: Counter[tuple[str, int]]  # by location and rank
    differences: list[str]
    seconds: float
    output: str


def survive(
    folder: Path, data: Path, count: int, num_ranks: int, seed: int, *settings: str, zero: str = "1"
) -> Outcome:
    """Kill a run `count` times until it finishes, and compare it with an uninterrupted one.

    Args:
        folder: for both runs.
        data: folders train and valid.
        count: kills.
        num_ranks: of each launch.
        seed: of locations, ranks and moments.
        settings: further ones of the run.
        zero: name of the DeepSpeed settings.
    """
    chance, steps, killed = random.Random(seed), count * STEPS_A_KILL + LAST_STEPS, folder / "killed.jsonl"
    plan = folder / "plan"
    faults = [random_fault(chance, "SIGKILL", number, num_ranks, killed) for number in range(count)]
    plan.write_text("".join(f"{json.dumps(fault)}\n" for fault in faults))
    uninterrupted, restarted = folder / "uninterrupted", folder / "restarted"
    done = run(
        *launcher(num_ranks, free_port()),
        *arguments(data, uninterrupted, *settings, steps=steps, zero=zero),
        limit_s=600,
    )
    assert done.code == 0, done.output
    command = [*launcher(num_ranks, free_port()), *arguments(data, restarted, *settings, steps=steps, zero=zero)]
    attempts = [sys.executable, "-m", "tests.faults.attempt", str(plan), str(killed), *command]
    began_s = time.monotonic()
    ended = run(*supervised(restarted, attempts, failures=count + 1), limit_s=120 * (count + 1))
    seconds = time.monotonic() - began_s
    assert ended.code == 0 and not ended.left, ended.output
    kills = Counter((kill["location"], kill["rank"]) for kill in signals_sent(killed))
    return Outcome(kills, differences(restarted, uninterrupted), seconds, ended.output)


def main() -> int:
    """Print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="kills (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="of the launch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of locations, ranks and moments (default: %(default)s)")
    parser.add_argument("--zero", default="1", help="name of the DeepSpeed settings (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_train_and_valid(folder / "data")
        outcome = survive(folder, folder / "data", given.count, given.ranks, given.seed, *given.set, zero=given.zero)
    for (location, rank), times in sorted(outcome.killed.items()):
        print(f"{times:3} x rank {rank} killed at {location}")
    total = outcome.killed.total()
    print(f"{total} of {given.count} kills, {outcome.seconds:.0f} s, no manual step")
    print("differences from the uninterrupted run: " + ("; ".join(outcome.differences) or "none, bit for bit"))
    return int(bool(outcome.differences) or total != given.count)


if __name__ == "__main__":
    sys.exit(main())
