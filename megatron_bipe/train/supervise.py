"""Decisions of tools/supervise.py after a launch has ended, without processes.

it reached the end of the run                    done
it received a stop request, and saved            exit, to be resumed later
it ended with an error that the user must fix    give up: a restart would fail again
it ended otherwise, with a new checkpoint        restart
it ended otherwise, too often without one        give up
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
from megatron_bipe.runtime.preemption import EXIT_RESUMABLE
from megatron_bipe.train.metrics_file import STOP, read_events

USER_ERROR = 2


class Next(Enum):
    """Decision after a launch."""

    DONE = "done"
    LATER = "later"
    AGAIN = "again"
    GIVE_UP = "give up"


class Mark(NamedTuple):
    """Progress of a run, from its folder."""

    num_events: int
    newest_step: int  # of the checkpoint to resume from; -1 if there is none


class Patience(NamedTuple):
    """Limits of restarts: number of failures and waiting times."""

    failures: int  # give up after this many launches in a row without a new checkpoint
    first_wait_s: float  # before the next launch; doubles after each further launch without a new checkpoint
    longest_wait_s: float

    def wait_s(self, fruitless: int) -> float:
        """Return the seconds to wait after `fruitless` launches in a row without a new checkpoint."""
        return float(min(self.longest_wait_s, self.first_wait_s * 2 ** max(0, fruitless - 1)))


def mark(run_dir: Path) -> Mark:
    newest = newest_first(run_dir)
    return Mark(len(read_events(run_dir)), newest[0].step if newest else -1)


def was_stopped(run_dir: Path, before: Mark) -> bool:
    """Return True if the run has stopped on request since `before`; some launchers do not forward its exit code."""
    return any(event["event"] == STOP for event in read_events(run_dir)[before.num_events :])


def decide(code: int, stopped: bool, asked: bool, fruitless: int, patience: Patience) -> Next:
    """Return the next action.

    Args:
        code: exit code of the launcher.
        stopped: True if the run stopped on request.
        asked: True if the supervisor itself received a stop request.
        fruitless: launches in a row without a new checkpoint, including this one.
        patience: limits of restarts.
    """
    if code == 0:
        return Next.DONE
    if stopped or asked or code == EXIT_RESUMABLE:
        return Next.LATER
    if code == USER_ERROR or fruitless >= patience.failures:
        return Next.GIVE_UP
    return Next.AGAIN


def usable_hosts(run_dir: Path, hosts: Sequence[str], ranks_per_host: int, least: int) -> Sequence[str]:
    """Return the largest prefix of `hosts` that fits the layout and global batch; all of them before the first start.

    Raises:
        ConfigError: there are fewer than `least`, or no number of hosts from `least` on fits.
    """
    config = run_dir / "config.yaml"
    run = load_run_config(config) if config.is_file() else None
    for num_hosts in range(len(hosts), max(1, least) - 1, -1):
        if run is None or _fits(run, num_hosts * ranks_per_host):
            return hosts[:num_hosts]
    raise ConfigError(
        f"{len(hosts)} hosts are up ({', '.join(hosts)}); the run needs at least {least}, and train.global_batch must "
        f"be divisible by the data-parallel ranks, with {ranks_per_host} ranks per host",
        remedy="Wait for more hosts, or lower --least-hosts",
        location=run_dir,
    )


def _fits(run: RunConfig, num_ranks: int) -> bool:
    try:
        validate_run(run, num_ranks)
    except ConfigError:
        return False
    return True
