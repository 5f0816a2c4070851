r"""Supervise a run: start its launcher, and restart it after each failure until the run is done.

After -- comes any command that starts pretrain.py on all ranks. After a failure its processes are ended, and it is
started again after a wait that doubles while no new checkpoint appears. Signals to stop are forwarded: after SIGTERM
and SIGINT, remaining processes are killed when --grace is over; after SIGUSR1 the run has unlimited time to save.

Exit codes: 0 the run is done; 1 it failed too often without a new checkpoint; 2 the message says what you can do about
it; 75 it was asked to stop, and saved: start this again later.

Examples:
    python tools/supervise.py runs/a -- examples/launch/one_machine.sh --set run_dir=runs/a
    python tools/supervise.py runs/a --hosts-command 'scontrol show hostnames' --ranks-per-host 8 --least-hosts 4 -- \
        srun --nodes {nodes} --nodelist {hosts} .venv/bin/python pretrain.py ...
"""

import argparse
import logging
import math
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from _cli import command
from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.child_processes import GRACE_S, ChildProcess
from megatron_bipe.runtime.preemption import EXIT_RESUMABLE, SIGNALS, parse_duration
from megatron_bipe.train.metrics_file import read_events
from megatron_bipe.train.supervise import Next, Patience, decide, mark, usable_hosts, was_stopped

EXIT_WAIT_S = 60.0  # for the remaining processes of a launch to exit by themselves
POLL_S = 0.2
URGENT_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # they leave the run no more than the grace period
CODES = {Next.DONE: 0, Next.LATER: EXIT_RESUMABLE}

_log = logging.getLogger(__name__)


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


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    run_dir, supervisor, fruitless = arguments.run_dir, Supervisor(parse_duration(arguments.grace)), 0
    waits = parse_duration(arguments.first_wait), parse_duration(arguments.longest_wait)
    patience = Patience(arguments.failures, *waits)
    while True:
        before = mark(run_dir)
        code = supervisor.launch(_filled(arguments, supervisor))
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
        _log.warning("supervise: exit code %d: %s%s", code, text[following], _goodput(run_dir))
        if following is not Next.AGAIN:
            break
        supervisor.wait(wait_s)
        if supervisor.asked:
            following = Next.LATER
            break
    if following is Next.LATER and arguments.on_stop:
        _on_stop(shlex.split(arguments.on_stop), supervisor)
    sys.exit(CODES.get(following, code if code == 2 else 1))


def _goodput(run_dir: Path) -> str:
    """Format the goodput in the run's last event; return "" if the launch did not end normally."""
    last = (read_events(run_dir) or [{}])[-1]
    return f" (goodput {last['goodput']:.1%} since the first start)" if last.get("goodput") is not None else ""


def _filled(arguments: argparse.Namespace, supervisor: Supervisor) -> list[str]:
    """Return the command, with {nodes} and {hosts} filled in if --hosts-command is given."""
    if not arguments.hosts_command:
        return list(arguments.command)
    listed = supervisor.output(shlex.split(arguments.hosts_command), "--hosts-command")
    hosts = usable_hosts(arguments.run_dir, listed.split(), arguments.ranks_per_host, arguments.least_hosts)
    values = {"{nodes}": str(len(hosts)), "{hosts}": ",".join(hosts)}
    filled = []
    for part in arguments.command:
        for name, value in values.items():
            part = part.replace(name, value)
        filled.append(part)
    return filled


def _on_stop(command: Sequence[str], supervisor: Supervisor) -> None:
    """Run the --on-stop command; an error is only logged, because the run has been saved."""
    try:
        code = supervisor.call(command, "--on-stop")
    except ConfigError as error:
        _log.error("supervise: %s", error)
    else:
        if code:
            _log.error("supervise: --on-stop %s failed with exit code %d; start the run again later", command, code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run_dir", type=Path, help="run folder, from which progress is read")
    add("--failures", type=int, default=3, metavar="N", help="give up after N launches without progress (%(default)s)")
    add("--first-wait", default="10s", metavar="TIME", help="wait before the second launch (default: %(default)s)")
    add("--longest-wait", default="10m", metavar="TIME", help="longest wait (default: %(default)s)")
    add(
        "--grace",
        default=f"{GRACE_S}s",
        metavar="TIME",
        help="time to save and exit after SIGTERM or SIGINT, before processes are killed (default: %(default)s)",
    )
    add("--on-stop", metavar="COMMAND", help="command for when the run was asked to stop, such as: scontrol requeue ID")
    add("--hosts-command", metavar="COMMAND", help="prints the available hosts; fills {nodes} and {hosts}")
    add("--ranks-per-host", type=int, default=8, metavar="N", help="(default: %(default)s)")
    add("--least-hosts", type=int, default=1, metavar="N", help="fewer hosts are an error (default: %(default)s)")
    add("command", nargs="+", help="command that starts the run, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
