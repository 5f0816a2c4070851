r"""Keep a run going: start its launcher, and start it again when it fails, until the run is done.

What stands after -- is any command that starts pretrain.py on all ranks. After a failure its processes are ended, and
it is started again, after a wait that doubles while no new checkpoint appears. Signals to stop are passed on.

Exit codes: 0 the run is done; 1 it failed too often at the same place; 2 the message says what you can do about it;
75 it was asked to stop, and saved: start this again later.

Examples:
    python tools/supervise.py runs/a -- examples/launch/one_machine.sh --set run_dir=runs/a
    python tools/supervise.py runs/a --hosts-command 'scontrol show hostnames' --ranks-per-host 8 --least-hosts 4 -- \
        srun --nodes {nodes} --nodelist {hosts} .venv/bin/python pretrain.py ...
"""

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from _cli import run_tool
from megatron_bipe.errors import ConfigError
from megatron_bipe.train.stopping import CONTINUE_LATER, SIGNALS, parse_duration
from megatron_bipe.train.supervise import Next, Patience, decide, mark, usable_hosts, was_stopped

LAST_WORDS_S, LOOK_S = 60.0, 0.2  # that what is left of a launch has to end by itself; between looks
CODES = {Next.DONE: 0, Next.LATER: CONTINUE_LATER}

_log = logging.getLogger(__name__)


class Supervisor:
    """Starts launches, one after the other, and passes signals on to the one that runs."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal that asked to stop
        self._process: subprocess.Popen[bytes] | None = None
        for number in (*SIGNALS, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def launch(self, command: Sequence[str]) -> int:
        """Run a command to its end, and end what it leaves; its exit code, 128 and more for a signal."""
        try:
            self._process = subprocess.Popen(command, start_new_session=True)
        except OSError as error:
            raise _no_command(command, error, "after --") from error
        group = self._process.pid
        if self.asked:  # while the command was being started
            _send(group, self.asked)
        code = self._process.wait()
        self._process = None
        left, deadline_s = _send(group, signal.SIGTERM), time.monotonic() + LAST_WORDS_S
        while left and time.monotonic() < deadline_s:
            time.sleep(LOOK_S)
            left = _send(group, 0)
        if left:
            _send(group, signal.SIGKILL)
        return code if code >= 0 else 128 - code

    def wait(self, seconds: float) -> None:
        """Do nothing, unless a signal comes."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not self.asked:
            time.sleep(LOOK_S)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.asked = number
        if self._process is not None:
            _send(self._process.pid, number)


def main() -> None:
    """Launch until there is nothing more to do."""
    arguments = _parser().parse_args()
    run_dir, supervisor, fruitless = arguments.run_dir, Supervisor(), 0
    waits = parse_duration(arguments.first_wait), parse_duration(arguments.longest_wait)
    patience = Patience(arguments.failures, *waits)
    while True:
        before = mark(run_dir)
        code = supervisor.launch(_filled(arguments))
        new = mark(run_dir).newest_step != before.newest_step  # lower where a damaged one had to be left
        fruitless = 0 if new else fruitless + 1
        following = decide(code, was_stopped(run_dir, before), bool(supervisor.asked), fruitless, patience)
        wait_s = patience.wait_s(fruitless)
        text = {
            Next.DONE: "the run is done",
            Next.LATER: "the run was asked to stop, and is to be continued",
            Next.AGAIN: f"{'after' if new else 'without'} a new checkpoint; starting again in {wait_s:g} s",
            Next.GIVE_UP: f"{fruitless} launches in a row without a new checkpoint; giving up",
        }
        _log.warning("supervise: exit code %d: %s", code, text[following])
        if following is not Next.AGAIN:
            break
        supervisor.wait(wait_s)
        if supervisor.asked:
            following = Next.LATER
            break
    if following is Next.LATER and arguments.on_stop:
        _on_stop(shlex.split(arguments.on_stop))
    sys.exit(CODES.get(following, code if code == 2 else 1))


def _filled(arguments: argparse.Namespace) -> list[str]:
    """The command, with {nodes} and {hosts} filled in where hosts are asked for."""
    if not arguments.hosts_command:
        return list(arguments.command)
    command = shlex.split(arguments.hosts_command)
    try:
        asked = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise _no_command(command, error, "--hosts-command") from error
    hosts = usable_hosts(arguments.run_dir, asked.stdout.split(), arguments.ranks_per_host, arguments.least_hosts)
    values = {"{nodes}": str(len(hosts)), "{hosts}": ",".join(hosts)}
    filled = []
    for part in arguments.command:
        for name, value in values.items():
            part = part.replace(name, value)
        filled.append(part)
    return filled


def _on_stop(command: Sequence[str]) -> None:
    """Run it; that it fails is said, and changes nothing: the run has been saved."""
    try:
        code = subprocess.run(command, check=False).returncode
    except OSError as error:
        _log.error("supervise: %s", _no_command(command, error, "--on-stop"))
    else:
        if code:
            _log.error("supervise: --on-stop %s left with exit code %d; start the run again later", command, code)


def _no_command(command: Sequence[str], error: OSError, place: str) -> ConfigError:
    return ConfigError(f"{command[0]!r} cannot be started: {error.strerror}", remedy="Name a command", place=place)


def _send(group: int, number: int) -> bool:
    """Signal all processes of a group; whether there was one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run_dir", type=Path, help="folder of the run, by which its progress is told")
    add("--failures", type=int, default=3, metavar="N", help="launches without progress to give up after (%(default)s)")
    add("--first-wait", default="10s", metavar="TIME", help="before the second launch (default: %(default)s)")
    add("--longest-wait", default="10m", metavar="TIME", help="(default: %(default)s)")
    add("--on-stop", metavar="COMMAND", help="run when the run was asked to stop, such as: scontrol requeue ID")
    add("--hosts-command", metavar="COMMAND", help="prints the hosts that are up; fills {nodes} and {hosts} below")
    add("--ranks-per-host", type=int, default=8, metavar="N", help="(default: %(default)s)")
    add("--least-hosts", type=int, default=1, metavar="N", help="fewer are an error (default: %(default)s)")
    add("command", nargs="+", help="what starts the run, after --")
    return parser


if __name__ == "__main__":
    run_tool(main)
