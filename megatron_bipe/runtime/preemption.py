"""Preemption: stopping before the end on a signal or a time limit.

Any rank may receive the request. Ranks agree after every step and every validation batch, over the hosts, so that all
stop at the same point. A request before the first step takes effect there.

    SIGTERM    sent by launchers, SLURM and clouds before they kill
    SIGUSR1    sent by SLURM ahead of the time limit: #SBATCH --signal=USR1@300
    SIGINT     Ctrl-C; a second one ends the process at once
    SIGHUP     the terminal or the connection to it was closed; ignored under nohup
    --stop-at  time limit, from the start of this process
"""

import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.child_processes import STOP_SIGNALS

EXIT_RESUMABLE = 75  # exit code of a saved run that can be resumed; EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 128 + signal.SIGINT
SECOND_AFTER_S = 0.3  # a terminal and a launcher may both send the signal of one Ctrl-C

_UNITS_S = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile("".join(rf"(?:(\d+){unit})?" for unit in _UNITS_S))

T = TypeVar("T")


class StopRequest:
    """A request to stop the run, from a signal or a time limit.

    Args:
        after_s: seconds from now until the time limit; infinity: none.
        clock: returns seconds.
    """

    def __init__(self, after_s: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._stop_at_s = clock, clock() + after_s
        self._signal: signal.Signals | None = None
        self._interrupted_at_s = math.inf
        self._any_rank: Callable[[bool], bool] = bool
        self._is_agreed = False

    def install_handlers(self) -> None:
        """Install handlers that record the signals instead of exiting."""
        install_stop_handlers(self._on_signal)

    def remove_handlers(self) -> None:
        """Ignore the signals, which launchers send to the remaining ranks once the first one has exited.

        A second Ctrl-C still ends this process.
        """
        for number in set(STOP_SIGNALS) - {signal.SIGINT}:
            signal.signal(number, signal.SIG_IGN)

    def agree_by(self, any_rank: Callable[[bool], bool]) -> None:
        """Decide on all ranks together from now on: `any_rank` returns True if its argument is true on any rank."""
        self._any_rank = any_rank

    @property
    def is_agreed(self) -> bool:
        """True if all ranks have agreed to stop."""
        return self._is_agreed

    @property
    def reason(self) -> str:
        """Signal or option that requested the stop on this rank; empty if there is none."""
        if self._signal is not None:
            return self._signal.name
        return "--stop-at" if self._clock() >= self._stop_at_s else ""

    def poll(self) -> bool:
        """Return True if any rank has a request; all ranks call this together, and the result stays true."""
        self._is_agreed = self._is_agreed or self._any_rank(bool(self.reason))
        return self._is_agreed

    def until(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items, at least one, until a rank has a request; all ranks must have the same number of items."""
        for number, item in enumerate(items):
            if number and self.poll():
                return
            yield item

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._clock() - self._interrupted_at_s > SECOND_AFTER_S:
                os.write(sys.stderr.fileno(), b"interrupted again: this rank exits without saving\n")
                os._exit(EXIT_INTERRUPTED)
            self._interrupted_at_s = min(self._interrupted_at_s, self._clock())
        self._signal = signal.Signals(number)


def install_stop_handlers(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call `handler` for each signal that asks to stop; SIGHUP stays ignored if it is, as under nohup."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def parse_duration(text: str, option: str) -> float:
    """Return the seconds of a duration such as `23h50m`, `90m`, `1d12h`, `45s`, the value of an option.

    Raises:
        ConfigError: the text does not have this form.
    """
    match = _DURATION.fullmatch(text)
    if not match or not text:
        raise ConfigError(
            f"{text!r} is not a duration",
            remedy="Write days, hours, minutes and seconds as 1d2h30m5s",
            location=option,
        )
    return float(
        sum(int(number or 0) * unit_s for number, unit_s in zip(match.groups(), _UNITS_S.values(), strict=True))
    )
