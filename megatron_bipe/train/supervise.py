"""Supervision of a run: its launcher is started, and started again after failures until the run is done.

After a launch has ended, the supervisor decides what to do next. Only the run itself knows whether it is done, so its
event log decides before exit codes, which launchers change: `deepspeed` exits with 0 if its inner process is killed.

it recorded its end                              done
it recorded a stop on request                    exit, to be resumed later
it ended with an error that the user must fix    give up: a restart would fail again
the supervisor was asked to stop                 exit, to be resumed later; without a new checkpoint
it ended otherwise, too often without a new one  give up
it ended otherwise                               restart
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bipe.config import RunConfig, load_run_config, validate_run
from megatron_bipe.errors import FAILED as EXIT_FAILED
from megatron_bipe.errors import USER_ERROR, BipeError, ConfigError, is_transient
from megatron_bipe.run_files import DONE, EVENTS, FAILED, STOP, last_launch_event, read_events
from megatron_bipe.runtime.preemption import EXIT_RESUMABLE
from megatron_bipe.train.alerts import Alerts, kept_webhook
from megatron_bipe.train.metrics_file import Events
from megatron_bipe.train.supervised_launch import Ended, Supervisor, mark

ON_FAILURE_LIMIT_S = 300.0  # for the --on-failure command
_log = logging.getLogger(__name__)


class Next(Enum):
    """Decision after a launch."""

    DONE = "done"
    LATER = "later"
    AGAIN = "again"
    GIVE_UP = "give up"


class Patience(NamedTuple):
    """Limits of restarts: number of failures and waiting times."""

    failures: int  # give up after this many launches in a row without a new checkpoint
    first_wait_s: float  # before the next launch; doubles after each further launch without a new checkpoint
    longest_wait_s: float

    def wait_s(self, fruitless: int) -> float:
        """Return the seconds to wait after `fruitless` launches in a row without a new checkpoint."""
        return float(min(self.longest_wait_s, self.first_wait_s * 2 ** max(0, fruitless - 1)))


def decide(ended: Ended, asked: bool, fruitless: int, patience: Patience) -> Next:
    """Return the next action.

    Args:
        ended: result of the launch.
        asked: True if the supervisor itself received a stop request.
        fruitless: launches in a row without a new checkpoint, including this one.
        patience: limits of restarts.
    """
    if ended.record == DONE:
        return Next.DONE
    if ended.record == STOP or ended.code == EXIT_RESUMABLE:
        return Next.LATER
    if ended.is_user_error:
        return Next.GIVE_UP
    if asked:
        return Next.LATER
    return Next.GIVE_UP if fruitless >= patience.failures else Next.AGAIN


def usable_hosts(run_dir: Path, hosts: Sequence[str], ranks_per_host: int, least: int) -> Sequence[str]:
    """Return the largest prefix of `hosts` that fits the layout and global batch; all of them before the first start.

    Raises:
        ConfigError: there are fewer than `least`, or no number of hosts from `least` on fits; transient if the run has
            begun.
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
        transient=run is not None,  # it has begun, so there were enough
    )


def _fits(run: RunConfig, num_ranks: int) -> bool:
    try:
        validate_run(run, num_ranks)
    except ConfigError:
        return False
    return True


def supervise(
    supervisor: Supervisor,
    patience: Patience,
    launch_command: Callable[[], Sequence[str]],
    on_failure: Sequence[str] = (),
) -> int:
    """Launch a run until it is done, is asked to stop, or has failed too often; return the supervisor's exit code.

    Args:
        supervisor: runner of the launches.
        patience: limits of restarts.
        launch_command: called before each launch; returns its command.
        on_failure: command that is run after each failed launch; empty: none.
    """
    fruitless = 0
    for attempt in itertools.count(1):
        supervisor.wait_for_lock()
        if supervisor.asked:
            break
        before = mark(supervisor.run_dir).newest_step
        ended = _launch(supervisor, launch_command)
        newest = mark(supervisor.run_dir).newest_step
        fruitless = 0 if newest != before else fruitless + 1  # lower if a damaged one was skipped
        following = decide(ended, bool(supervisor.asked), fruitless, patience)
        wait_s = patience.wait_s(fruitless) if following is Next.AGAIN else None
        text = {
            Next.DONE: "the run is done",
            Next.LATER: _stop_text(ended, newest, newest != before),
            Next.AGAIN: f"{'without' if fruitless else 'after'} a new checkpoint; starting again in {wait_s} s",
            Next.GIVE_UP: "this error must be fixed first"
            if ended.is_user_error
            else f"{fruitless} launches in a row without a new checkpoint; giving up",
        }[following]
        _log.warning("supervise: %s: %s%s", ended, text, _goodput_text(supervisor.run_dir))
        is_failure = following in (Next.AGAIN, Next.GIVE_UP) or (following is Next.LATER and not ended.lost_nothing)
        if is_failure:
            failure = Failure(ended, _reason(supervisor.run_dir, ended), attempt, wait_s)
            _report_failure(supervisor.run_dir, failure)
            if on_failure:
                run_on_failure(on_failure, supervisor, failure)
        if following is Next.DONE:
            return 0
        if following is Next.GIVE_UP:
            return USER_ERROR if ended.is_user_error else EXIT_FAILED
        if following is Next.LATER:
            return EXIT_FAILED if is_failure else EXIT_RESUMABLE
        supervisor.wait(patience.wait_s(fruitless))
    return EXIT_RESUMABLE


def _launch(supervisor: Supervisor, launch_command: Callable[[], Sequence[str]]) -> Ended:
    """Launch the run; if its command cannot be determined now, but perhaps later, return that as a failed launch."""
    try:
        return supervisor.launch(launch_command())
    except BipeError as error:
        if not is_transient(error):
            raise
        return Ended(EXIT_FAILED, error=f"{type(error).__name__}: {error}")


def _stop_text(ended: Ended, newest: int, is_new: bool) -> str:
    """Explain how a launch that was asked to stop has ended.

    Args:
        ended: result of the launch.
        newest: step of the newest checkpoint; -1 if there is none.
        is_new: True if the launch saved it.
    """
    saved = f"saved step {newest}" if is_new else "saved nothing"
    if not ended.lost_nothing:
        how = f"ended before it had recorded that; it {saved}, and later steps are lost"
    else:
        how = saved if is_new else f"{saved}, because there was nothing new to save"
    resumes = f"resumes from step {newest}" if newest >= 0 else "starts from the beginning"
    return f"the run was asked to stop, and {how}. The same command {resumes}"


class Failure(NamedTuple):
    """A launch that has failed."""

    ended: Ended
    reason: str  # "": not known
    attempt: int  # number of the launch, from 1
    wait_s: float | None  # before the next launch; None: none follows

    def facts(self) -> dict[str, Any]:
        """Return the facts of its event."""
        how = {"exit_code": self.ended.code, "signal": self.ended.signal_name, "reason": self.reason}
        return {"by": "supervisor"} | how | {"attempt": self.attempt, "wait_s": self.wait_s}


def _reason(run_dir: Path, ended: Ended) -> str:
    """Return why a launch failed; "" if that is not known."""
    if not ended.error and ended.code == 0:
        return (
            f"{run_dir / EVENTS} does not record the end of the run: a process of the launcher was killed, or the "
            "command trains in another folder"
        )
    return ended.error


def _report_failure(run_dir: Path, failure: Failure) -> None:
    """Log why a launch failed, record it in the run folder, if there is one, and send a message."""
    _log.warning("supervise: %s", failure.reason or "no rank has reported why; see the output above")
    alerts = Alerts(kept_webhook(run_dir), run_dir)
    if run_dir.is_dir():
        Events(run_dir, is_main=True, listen=alerts.add).add(FAILED, **failure.facts())
    else:
        alerts.add({"event": FAILED} | failure.facts())
    alerts.close()


def fill_hosts(
    command: Sequence[str], supervisor: Supervisor, hosts_command: Sequence[str], ranks_per_host: int, least: int
) -> list[str]:
    """Return a command with {nodes} and {hosts} filled in from the hosts that `hosts_command` prints.

    Raises:
        ConfigError: the command cannot be started or failed, or as in `usable_hosts`.
    """
    listed = supervisor.output(hosts_command, "--hosts-command")
    hosts = usable_hosts(supervisor.run_dir, listed.split(), ranks_per_host, least)
    return [part.replace("{nodes}", str(len(hosts))).replace("{hosts}", ",".join(hosts)) for part in command]


def run_on_stop(command: Sequence[str], supervisor: Supervisor) -> None:
    """Run the --on-stop command; an error is only logged, because the run can be resumed."""
    try:
        code = supervisor.call(command, "--on-stop")
    except ConfigError as error:
        _log.error("supervise: %s", error)
    else:
        if code:
            _log.error("supervise: --on-stop %s failed with exit code %d; start the run again later", command, code)


def run_on_failure(command: Sequence[str], supervisor: Supervisor, failure: Failure) -> None:
    """Run the --on-failure command for at most `ON_FAILURE_LIMIT_S`; an error is only logged."""
    facts = failure.facts() | {"step": mark(supervisor.run_dir).newest_step, "run_dir": supervisor.run_dir.resolve()}
    env = {f"BIPE_{key.upper()}": "" if value is None else str(value) for key, value in facts.items()}
    try:
        code = supervisor.call(command, "--on-failure", env, ON_FAILURE_LIMIT_S)
    except ConfigError as error:
        _log.error("supervise: %s", error)
    else:
        if code is None:
            _log.error("supervise: --on-failure %s was ended after %g s", command, ON_FAILURE_LIMIT_S)
        elif code:
            _log.error("supervise: --on-failure %s failed with exit code %d", command, code)


def _goodput_text(run_dir: Path) -> str:
    """Format the goodput with which the last launch has ended; return "" if it did not end normally."""
    last = last_launch_event(read_events(run_dir))
    return f" (goodput {last['goodput']:.1%} since the first start)" if last.get("goodput") is not None else ""
