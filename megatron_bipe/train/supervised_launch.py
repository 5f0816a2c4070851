"""One launch of a supervised run: its processes, requests to stop it, and how it ended.

Only the run itself knows whether it is done, so its event log decides and not exit codes, which launchers change:
`deepspeed` exits with 0 if its inner process is killed. The log is read before processes that remain get a signal,
which could make them record a stop.
"""

import logging
import math
import shlex
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from megatron_bipe.checkpoint.find import newest_first
from megatron_bipe.config import ParallelConfig, load_run_config
from megatron_bipe.errors import USER_ERROR, ConfigError
from megatron_bipe.io import lock_holder
from megatron_bipe.run_files import DONE, LOCK_FOLDER, START, STOP, last_record, read_events
from megatron_bipe.runtime.child_processes import GRACE_S, STOP_SIGNALS, ChildProcess
from megatron_bipe.runtime.environment import FAILURE_FILE
from megatron_bipe.runtime.preemption import EXIT_RESUMABLE, SECOND_AFTER_S, install_stop_handlers
from megatron_bipe.train.metrics_file import last_step_text

EXIT_WAIT_S = 60.0  # for the remaining processes of a run that is over to exit
LEAVE_S = 10.0  # for ranks to notice that their launcher or another rank has ended, and to report it
POLL_S = 0.2
LOCK_POLL_S, LOCK_LOG_S = 5.0, 600.0  # between two looks at the lock of another launch, and between two log lines

_log = logging.getLogger(__name__)


class Mark(NamedTuple):
    """Progress of a run, from its folder."""

    num_events: int
    newest_step: int  # of the checkpoint to resume from; -1 if there is none


class Ended(NamedTuple):
    """Result of a launch."""

    code: int  # exit code of the launcher; 128 + N for signal N
    record: str = ""  # last of START, STOP and DONE that the launch recorded; "" if it did not begin to train
    error: str = ""  # message of the first rank that failed on this host
    error_code: int | None = None  # exit code of that rank; torchrun exits with 1 whatever it is

    @property
    def is_user_error(self) -> bool:
        return USER_ERROR in (self.code, self.error_code)

    @property
    def signal_name(self) -> str:
        """Name of the signal that ended the launcher or, as reported by DeepSpeed (256 - N), a rank; "" if none.

        255 is the code of ssh, srun and scripts for an error, and ranks do not end by signal 1, SIGHUP.
        """
        if self.code == 255:
            return ""
        number = 256 - self.code if self.code > 256 - signal.NSIG else self.code - 128
        return signal.Signals(number).name if number in set(signal.Signals) else ""

    @property
    def lost_nothing(self) -> bool:
        """True if the run has stopped on request, or had not begun to train."""
        return self.code == EXIT_RESUMABLE or self.record != START

    def __str__(self) -> str:
        return f"exit code {self.code}{f' ({self.signal_name})' if self.signal_name else ''}"


def mark(run_dir: Path) -> Mark:
    newest = newest_first(run_dir)
    return Mark(len(read_events(run_dir)), newest[0].step if newest else -1)


def record_since(run_dir: Path, before: Mark) -> str:
    """Return the last of START, STOP and DONE that the run has recorded since `before`; "" if there is none."""
    return last_record(read_events(run_dir)[before.num_events :])


class Supervisor:
    """Runner of commands, one after the other, that forwards requests to stop to the current one.

    A request to stop is one of `STOP_SIGNALS`. After all but SIGUSR1, processes that remain for the grace period are
    killed; after a second SIGINT, at once.

    Args:
        run_dir: run folder, from which progress is read.
        grace_s: grace period; None: `parallel.timeout_s` if the launch has begun to train, else there is nothing to
            save, and it is `GRACE_S`.
    """

    def __init__(self, run_dir: Path, grace_s: float | None = None) -> None:
        self.run_dir = run_dir
        self.asked: int | None = None  # the signal that asked to stop
        self._grace_s = grace_s
        self._pending: int | None = None  # signal that has not been forwarded yet
        self._interrupted_at_s = math.inf
        self._kill_at_s = math.inf
        self._launched: ChildProcess | None = None
        self._before = Mark(0, -1)  # when the current launch began
        install_stop_handlers(self._on_signal)

    def launch(self, command: Sequence[str]) -> Ended:
        """Run a command, end the processes that it leaves, and return how it ended."""
        self._before = mark(self.run_dir)
        with tempfile.NamedTemporaryFile(prefix="failures-") as file:
            # torchrun by itself dies of SIGUSR1, and kills ranks 30 seconds after it has forwarded a signal.
            signals = ",".join(number.name for number in STOP_SIGNALS)
            timeout = {"PET_SHUTDOWN_TIMEOUT": f"{self._timeout_s():.0f}", "PET_SIGNALS_TO_HANDLE": signals}
            with self._start(command, "after --", env={FAILURE_FILE: file.name, **timeout}) as child:
                self._launched, self._pending = child, self.asked  # one may have come while the command was started
                code = self._wait_for(child)
                code = code if code >= 0 else 128 - code
                self._end_rest(child, Ended(code))
                self._launched = None
            first_failure = file.read().partition(b"\0")[0].decode(errors="replace")
        error_code, _, error = first_failure.partition(" ")
        record = record_since(self.run_dir, self._before)
        return Ended(code, record, error, int(error_code) if error_code.isdecimal() else None)

    def output(self, command: Sequence[str], option: str) -> str:
        """Run a command, and return what it printed.

        Raises:
            ConfigError: the command cannot be started, or failed (transient).
        """
        with tempfile.TemporaryFile("w+") as file, self._start(command, option, stdout=file) as child:
            code = self._wait_for(child)
            file.seek(0)
            if code:
                raise ConfigError(
                    f"{shlex.join(command)} failed with exit code {code}",
                    remedy="Run it alone to see why",
                    location=option,
                    transient=True,
                )
            return file.read()

    def call(
        self, command: Sequence[str], option: str, env: dict[str, str] | None = None, limit_s: float = math.inf
    ) -> int | None:
        """Run a command, and return its exit code; None if it was killed after `limit_s`."""
        with self._start(command, option, env=env) as child:
            deadline_s = time.monotonic() + limit_s
            self._wait_until(lambda: child.process.poll() is not None, deadline_s)
            is_late = child.process.returncode is None and time.monotonic() >= deadline_s
            return None if is_late else self._wait_for(child)

    def wait(self, seconds: float) -> None:
        """Wait, or return early if a signal arrives."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not self.asked:
            time.sleep(POLL_S)

    def wait_for_lock(self) -> None:
        """Wait until no other launch trains in the run folder, or return early if a signal arrives."""
        log_at_s = -math.inf
        while not self.asked and (holder := lock_holder(self.run_dir / LOCK_FOLDER)):
            if time.monotonic() >= log_at_s:
                facts = ", ".join(filter(None, (holder, last_step_text(self.run_dir))))
                _log.warning("supervise: waiting for another launch of %s: %s", self.run_dir, facts)
                log_at_s = time.monotonic() + LOCK_LOG_S
            self.wait(LOCK_POLL_S)

    def _start(
        self, command: Sequence[str], option: str, stdout: IO[str] | None = None, env: dict[str, str] | None = None
    ) -> ChildProcess:
        self._kill_at_s, self._pending = math.inf, None
        try:
            return ChildProcess(command, env, stdout=stdout)
        except OSError as error:
            raise ConfigError(
                f"{command[0]!r} cannot be started: {error.strerror}", remedy="Check the command", location=option
            ) from error

    def _wait_for(self, child: ChildProcess) -> int:
        self._wait_until(lambda: child.process.poll() is not None)
        if child.process.returncode is None:
            child.kill()
        return int(child.process.returncode)

    def _end_rest(self, child: ChildProcess, ended: Ended) -> None:
        """End the processes that a launcher leaves.

        Ranks that were asked to stop may be saving. Others notice that their launcher has ended; SIGTERM would ask
        those that have not to stop, and they would record a request that nobody made.
        """
        asked = self.asked or ended.signal_name in [number.name for number in STOP_SIGNALS]
        limit_s = self._timeout_s() if asked else LEAVE_S
        self._wait_until(lambda: child.is_over() or self._is_concluded(), time.monotonic() + limit_s)
        if self._is_concluded():
            child.send(signal.SIGTERM)
            self._wait_until(child.is_over, time.monotonic() + EXIT_WAIT_S)
        child.kill()

    def _is_concluded(self) -> bool:
        return record_since(self.run_dir, self._before) in (STOP, DONE)

    def _timeout_s(self) -> float:
        """Return `parallel.timeout_s` of the run; its default before the first start."""
        try:
            return load_run_config(self.run_dir / "config.yaml").parallel.timeout_s
        except ConfigError:
            return ParallelConfig().timeout_s

    def _wait_until(self, is_over: Callable[[], bool], limit_s: float = math.inf) -> None:
        while not is_over() and time.monotonic() < min(limit_s, self._kill_at_s):
            self._forward()
            time.sleep(POLL_S)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.asked = self._pending = number
        if number == signal.SIGINT:
            if time.monotonic() - self._interrupted_at_s > SECOND_AFTER_S:
                self._kill_at_s = -math.inf
            self._interrupted_at_s = min(self._interrupted_at_s, time.monotonic())

    def _forward(self) -> None:
        """Send the pending signal to the current launch; all but SIGUSR1 become SIGTERM, and begin the grace period."""
        number, self._pending = self._pending, None
        if number is None:
            return
        if number != signal.SIGUSR1:
            self._kill_at_s = min(self._kill_at_s, time.monotonic() + self._grace_period_s())
        if self._launched is not None:
            self._launched.ask_to_stop(number if number == signal.SIGUSR1 else signal.SIGTERM)

    def _grace_period_s(self) -> float:
        if self._grace_s is not None:
            return self._grace_s
        has_begun = self._launched is not None and record_since(self.run_dir, self._before)
        return self._timeout_s() if has_begun else GRACE_S
