"""Ask a run to stop repeatedly, and compare it with an uninterrupted run.

    python -m tests.faults.stops --count 10

Each time one rank, drawn at random, gets SIGTERM or SIGUSR1 at a random moment of its start, of loading, of a step, of
a validation, of a checkpoint. All ranks must finish the current step, or abort the validation, save, and exit
with exit code 75; restarted, the run must end bit-identical to the uninterrupted one, which holds on a CPU.
"""

import argparse
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_bipe.run_files import read_events
from megatron_bipe.runtime.preemption import EXIT_RESUMABLE
from tests.helpers.commands import EndedCommand, run
from tests.helpers.datasets import write_train_and_valid
from tests.helpers.ranks import free_port
from tests.helpers.small_runs import arguments, differences, launcher, random_fault, signals_sent

STEPS_A_STOP, LAST_STEPS = 5, 6
SIGNALS = ("SIGTERM", "SIGUSR1")


class Stop(NamedTuple):
    """One request to stop."""

    signal: str
    rank: int
    at: str  # location of the rank that got it
    saved_step: int  # last step before the run stopped


class Outcome(NamedTuple):
    """Requests that were made, and differences of the two runs."""

    stops: list[Stop]
    problems: list[str]


def stop_and_resume(folder: Path, data: Path, count: int, num_ranks: int, seed: int, *settings: str) -> Outcome:
    """Stop a run `count` times until it finishes, and compare it with an uninterrupted one."""
    chance, steps, sent = random.Random(seed), count * STEPS_A_STOP + LAST_STEPS, folder / "sent.jsonl"

    def launch(run_dir: Path, env: dict[str, str]) -> EndedCommand:
        command = [*launcher(num_ranks, free_port()), *arguments(data, run_dir, *settings, steps=steps)]
        return run(*command, env=env, limit_s=600)

    uninterrupted, stopped = folder / "uninterrupted", folder / "stopped"
    assert (done := launch(uninterrupted, {})).code == 0, done.output
    stops, problems = [], []
    for number in range(count):
        name = SIGNALS[number % len(SIGNALS)]
        ended = launch(stopped, random_fault(chance, name, number, num_ranks, sent).variables)
        got, last = signals_sent(sent)[-1], read_events(stopped)[-1]
        stops.append(Stop(name, got["rank"], got["in"], last["step"]))
        problems += _problems(stops[-1], ended, last["event"])
    assert (done := launch(stopped, {})).code == 0, done.output
    return Outcome(stops, [*problems, *differences(stopped, uninterrupted)])


def _problems(stop: Stop, ended: EndedCommand, last_event: str) -> Iterator[str]:
    step = re.search(r"\d+", stop.at)  # the signal may arrive right after the ranks' agreement
    if last_event != "stop" or (step is not None and stop.saved_step - int(step[0]) not in (0, 1)):
        yield f"{stop}: {ended.output}"
    codes = re.findall(r"exitcode *: (-?\d+)", ended.output)  # of the ranks, as torchrun reports them
    if ended.code == 0 or not codes or set(codes) != {str(EXIT_RESUMABLE)} or ended.left:
        yield f"{stop}: exit codes {codes}: {ended.output}"


def main() -> int:
    """Print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10, help="requests (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="of the launch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of ranks and moments (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        data = write_train_and_valid(Path(name) / "data")
        outcome = stop_and_resume(Path(name), data, given.count, given.ranks, given.seed, *given.set)
    for stop in outcome.stops:
        print(f"{stop.signal} to rank {stop.rank} at {stop.at}: saved step {stop.saved_step}")
    print(f"{len(outcome.stops)} of {given.count} stops on {given.ranks} ranks")
    print(
        "problems and differences from the uninterrupted run: " + ("; ".join(outcome.problems) or "none, bit for bit")
    )
    return int(bool(outcome.problems))


if __name__ == "__main__":
    sys.exit(main())
