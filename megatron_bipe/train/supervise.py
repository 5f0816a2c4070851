"""Supervision of a run: its launcher is started, and started again after failures until the run is done.

After a launch has ended, the supervisor decides what to do next:

it reached the end of the run                    done
it received a stop request, and saved            exit, to be resumed later
it ended with an error that the user must fix    give up: a restart would fail again
it ended otherwise, with a new checkpoint        restart
it ended otherwise, too often without one        give up
"""

import logging
import math
import shlex
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from megatron_bipe.checkpoint.find import newest_first
from megatron_bipe.config import RunConfig, load_run_config, validate_run
from megatron_bipe.errors import FAILED, USER_ERROR, ConfigError
from megatron_bipe.runtime.child_processes import ChildProcess
from megatron_bipe.runtime.preemption import EXIT_RESUMABLE, SIGNALS
from megatron_bipe.train.metrics_file import STOP, read_events

EXIT_WAIT_S = 60.0  # for the remaining processes of a launch to exit by themselves
POLL_S = 0.2
URGENT_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # they leave the run no more than the grace period

_log = logging.getLogger(__name__)


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


class Supervisor:
    """Runner of commands, one after the other, that forwards signals to the current one.

    Processes that remain `grace_s` after SIGTERM or SIGINT are killed.
    """

    def __init__(self, grace_s: float) -> None:
        self.asked: int | None = None  # the signal that asked to stop
        self._grace_s = grace_s
        self._kill_at_s = math.inf
        self._launched: ChildProcess | None = None
        for number in (*SIGNALS, signal.SIGINT):
            signal.signal(number, self._forward)

    def launch(self, command: Sequence[str]) -> int:
        """Run a command, end the processes that it leaves, and return its exit code: 128 + N for signal N."""
        with self._start(command, "after --") as child:
            self._launched = child
            if self.asked:  # it came while the command was being started
                self._forward(self.asked, None)
            code = self._wait_for(child)
            self._launched = None
            child.send(signal.SIGTERM)
            self._wait_until(child.is_over, time.monotonic() + EXIT_WAIT_S)
            child.kill()
        return code if code >= 0 else 128 - code

    def output(self, command: Sequence[str], option: str) -> str:
        """Run a command, and return what it printed."""
        with tempfile.TemporaryFile("w+") as file, self._start(command, option, stdout=file) as child:
            self._wait_for(child)
            file.seek(0)
            return file.read()

    def call(self, command: Sequence[str], option: str) -> int:
        """Run a command, and return its exit code."""
        with self._start(command, option) as child:
            return self._wait_for(child)

    def wait(self, seconds: float) -> None:
        """Wait, or return early if a signal arrives."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not self.asked:
            time.sleep(POLL_S)

    def _start(self, command: Sequence[str], option: str, stdout: IO[str] | None = None) -> ChildProcess:
        self._kill_at_s = math.inf
        try:
            return ChildProcess(command, stdout=stdout)
        except OSError as error:
            raise ConfigError(
                f"{command[0]!r} cannot be started: {error.strerror}", remedy="Check the command", location=option
            ) from error

    def _wait_for(self, child: ChildProcess) -> int:
        self._wait_until(lambda: child.process.poll() is not None)
        if child.process.returncode is None:
            child.kill()
        return int(child.process.returncode)

    def _wait_until(self, is_over: Callable[[], bool], limit_s: float = math.inf) -> None:
        while not is_over() and time.monotonic() < min(limit_s, self._kill_at_s):
            time.sleep(POLL_S)

    def _forward(self, number: int, _: FrameType | None) -> None:
        self.asked = number
        if number in URGENT_SIGNALS:
            self._kill_at_s = min(self._kill_at_s, time.monotonic() + self._grace_s)
        if self._launched is not None:
            self._launched.send(number)


def supervise(
    run_dir: Path, supervisor: Supervisor, patience: Patience, launch_command: Callable[[], Sequence[str]]
) -> int:
    """Launch a run until it is done, is asked to stop, or has failed too often; return the supervisor's exit code.

    Args:
        run_dir: run folder, from which progress is read.
        supervisor: runner of the launches.
        patience: limits of restarts.
        launch_command: called before each launch; returns its command.
    """
    fruitless = 0
    while True:
        before = mark(run_dir)
        code = supervisor.launch(launch_command())
        new = mark(run_dir).newest_step != before.newest_step  # lower if a damaged one was skipped
        fruitless = 0 if new else fruitless + 1
        following = decide(code, was_stopped(run_dir, before), bool(supervisor.asked), fruitless, patience)
        wait_s = patience.wait_s(fruitless)
        text = {
            Next.DONE: "the run is done",
            Next.LATER: "the run was asked to stop, and can be resumed",
            Next.AGAIN: f"{'after' if new else 'without'} a new checkpoint; starting again in {wait_s:g} s",
            Next.GIVE_UP: f"{fruitless} launches in a row without a new checkpoint; giving up",
        }
        _log.warning("supervise: exit code %d: %s%s", code, text[following], _goodput_text(run_dir))
        if following is Next.DONE:
            return 0
        if following is Next.GIVE_UP:
            return code if code == USER_ERROR else FAILED
        if following is Next.AGAIN:
            supervisor.wait(wait_s)
        if following is Next.LATER or supervisor.asked:
            return EXIT_RESUMABLE


def fill_hosts(
    command: Sequence[str], run_dir: Path, supervisor: Supervisor, hosts_command: str, ranks_per_host: int, least: int
) -> list[str]:
    """Return a command with {nodes} and {hosts} filled in from the hosts that `hosts_command` prints.

    Raises:
        ConfigError: the command cannot be started, or as in `usable_hosts`.
    """
    listed = supervisor.output(shlex.split(hosts_command), "--hosts-command")
    hosts = usable_hosts(run_dir, listed.split(), ranks_per_host, least)
    return [part.replace("{nodes}", str(len(hosts))).replace("{hosts}", ",".join(hosts)) for part in command]


def run_on_stop(command: Sequence[str], supervisor: Supervisor) -> None:
    """Run the --on-stop command; an error is only logged, because the run has been saved."""
    try:
        code = supervisor.call(command, "--on-stop")
    except ConfigError as error:
        _log.error("supervise: %s", error)
    else:
        if code:
            _log.error("supervise: --on-stop %s failed with exit code %d; start the run again later", command, code)


def _goodput_text(run_dir: Path) -> str:
    """Format the goodput in the run's last event; return "" if the launch did not end normally."""
    last = (read_events(run_dir) or [{}])[-1]
    return f" (goodput {last['goodput']:.1%} since the first start)" if last.get("goodput") is not None else ""
