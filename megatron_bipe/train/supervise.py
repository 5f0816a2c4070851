"""What to do when a launch has ended: decisions of tools/supervise.py, without processes.

it reached the end of the run                      done
it was asked to stop, and saved                    leave, to be continued later
the user has to do something                       give up: starting it again would say the same
anything else, and it got further than before      start it again
anything else, so many times at the same place     give up
"""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from megatron_bipe.checkpoint.find import newest_first
from megatron_bipe.config.load import load_run_config
from megatron_bipe.config.schema import RunConfig
from megatron_bipe.config.validate import validate_run
from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.preemption import CONTINUE_LATER
from megatron_bipe.train.events import STOP, read_events

USER_ERROR = 2


class Next(Enum):
    """What follows a launch."""

    DONE = "done"
    LATER = "later"
    AGAIN = "again"
    GIVE_UP = "give up"


class Mark(NamedTuple):
    """What a run folder shows of how far a run is."""

    num_events: int
    newest_step: int  # of the checkpoint it would go on from; -1 where there is none


class Patience(NamedTuple):
    """How often to try, and how long to wait."""

    failures: int  # launches in a row without a new checkpoint, after which to give up
    first_wait_s: float  # before the next launch; twice as long after each further one without a new checkpoint
    longest_wait_s: float

    def wait_s(self, fruitless: int) -> float:
        """Seconds to wait after so many launches in a row without a new checkpoint."""
        return float(min(self.longest_wait_s, self.first_wait_s * 2 ** max(0, fruitless - 1)))


def mark(run_dir: Path) -> Mark:
    """How far the run is."""
    newest = newest_first(run_dir)
    return Mark(len(read_events(run_dir)), newest[0].step if newest else -1)


def was_stopped(run_dir: Path, before: Mark) -> bool:
    """Whether the run was asked to stop since then, and did; launchers do not all pass its exit code on."""
    return any(event["event"] == STOP for event in read_events(run_dir)[before.num_events :])


def decide(code: int, stopped: bool, asked: bool, fruitless: int, patience: Patience) -> Next:
    """What follows.

    Args:
        code: exit code of the launcher.
        stopped: whether the run was asked to stop, and did.
        asked: whether the supervisor itself was asked to.
        fruitless: launches in a row without a new checkpoint, this one included.
        patience: with failures.
    """
    if code == 0:
        return Next.DONE
    if stopped or asked or code == CONTINUE_LATER:
        return Next.LATER
    if code == USER_ERROR or fruitless >= patience.failures:
        return Next.GIVE_UP
    return Next.AGAIN


def usable_hosts(run_dir: Path, hosts: Sequence[str], ranks_per_host: int, least: int) -> Sequence[str]:
    """As many of the hosts as the run can be laid out over, its global batch kept; all before it has begun.

    Raises:
        ConfigError: there are fewer than `least`, or no number of them from there on will do.
    """
    config = run_dir / "config.yaml"
    run = load_run_config(config) if config.is_file() else None
    for num_hosts in range(len(hosts), max(1, least) - 1, -1):
        if run is None or _fits(run, num_hosts * ranks_per_host):
            return hosts[:num_hosts]
    raise ConfigError(
        f"{len(hosts)} hosts are up ({', '.join(hosts)}); the run needs a number of them from {least} on whose ranks, "
        f"{ranks_per_host} each, share train.global_batch evenly",
        remedy="Wait for more hosts, or lower --least-hosts",
        location=run_dir,
    )


def _fits(run: RunConfig, num_ranks: int) -> bool:
    try:
        validate_run(run, num_ranks)
    except ConfigError:
        return False
    return True
