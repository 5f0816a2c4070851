r"""Supervise a run: start its launcher, and restart it after each failure until the run is done.

After -- comes any command that starts pretrain.py on all ranks. RUN_DIR is its run_dir: events.jsonl there decides
whether the run is done. After a failure its processes are ended, and it is started again after a wait that doubles
while no new checkpoint appears. While another launch trains in the folder, this waits.

Requests to stop are forwarded: after SIGTERM, SIGINT (Ctrl-C) and SIGHUP, remaining processes are killed when --grace
is over; after SIGUSR1 the run has unlimited time to save. A second Ctrl-C kills them at once.

Exit codes: 0 the run is done; 1 it failed too often without a new checkpoint, or was asked to stop and did not save; 2
the message says what you can do about it; 75 it was asked to stop, and saved: start this again later.

Examples:
    python tools/supervise.py runs/a -- examples/launch/one_machine.sh --set run_dir=runs/a
    python tools/supervise.py runs/a --hosts-command 'scontrol show hostnames' --ranks-per-host 8 --least-hosts 4 -- \
        srun --nodes {nodes} --nodelist {hosts} .venv/bin/python pretrain.py ...
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from _cli import command
from megatron_bipe.errors import FAILED, ConfigError
from megatron_bipe.runtime.child_processes import GRACE_S
from megatron_bipe.runtime.preemption import EXIT_RESUMABLE, parse_duration
from megatron_bipe.train.supervise import Patience, fill_hosts, run_on_stop, supervise
from megatron_bipe.train.supervised_launch import Supervisor


@command
def main(argv: Sequence[str] | None) -> None:
    given = _parser().parse_args(argv)
    if given.failures < 1:
        raise ConfigError(f"--failures {given.failures}", remedy="Give an integer of 1 or more", location="--failures")
    if given.run_dir.exists() and not given.run_dir.is_dir():
        raise ConfigError("RUN_DIR is not a folder", remedy="Give the run_dir of the command", location=given.run_dir)
    waits = parse_duration(given.first_wait, "--first-wait"), parse_duration(given.longest_wait, "--longest-wait")
    patience = Patience(given.failures, *waits)
    hosts_command, on_stop = _split(given.hosts_command, "--hosts-command"), _split(given.on_stop, "--on-stop")
    on_failure = _split(given.on_failure, "--on-failure")
    supervisor = Supervisor(given.run_dir, parse_duration(given.grace, "--grace") if given.grace else None)

    def launch_command() -> list[str]:
        if not hosts_command:
            return list(given.command)
        limits = given.ranks_per_host, given.least_hosts
        return fill_hosts(given.command, supervisor, hosts_command, *limits)

    code = supervise(supervisor, patience, launch_command, on_failure)
    was_stopped = code == EXIT_RESUMABLE or (code == FAILED and supervisor.asked is not None)
    if was_stopped and on_stop:
        run_on_stop(on_stop, supervisor)
    sys.exit(code)


def _split(text: str | None, option: str) -> list[str]:
    """Split a command at its spaces, as a shell does."""
    try:
        return shlex.split(text or "")
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a command: {error}", remedy="Quote it", location=option) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run_dir", type=Path, help="run folder, from which progress is read")
    add("--failures", type=int, default=3, metavar="N", help="give up after N launches without progress (%(default)s)")
    add("--first-wait", default="10s", metavar="TIME", help="wait before the second launch (default: %(default)s)")
    add("--longest-wait", default="10m", metavar="TIME", help="longest wait (default: %(default)s)")
    add(
        "--grace",
        metavar="TIME",
        help="time to save and exit after a request to stop, before processes are killed (default: parallel.timeout_s "
        f"of a run that trains, else {GRACE_S}s)",
    )
    add("--on-stop", metavar="COMMAND", help="command for when the run was asked to stop, such as: scontrol requeue ID")
    add("--on-failure", metavar="COMMAND", help="command for after each failed launch; BIPE_REASON etc. say why")
    add("--hosts-command", metavar="COMMAND", help="prints the available hosts; fills {nodes} and {hosts}")
    add("--ranks-per-host", type=int, default=8, metavar="N", help="(default: %(default)s)")
    add("--least-hosts", type=int, default=1, metavar="N", help="fewer hosts are an error (default: %(default)s)")
    add("command", nargs="+", help="command that starts the run, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
