"""Leaving before the end, on request: a signal, or a time limit.

Any rank may be asked; ranks ask each other after every step and every validation batch, host to host, so that all stop
at the same place. What is asked for before the first step is granted there.

    SIGTERM    what launchers, SLURM and clouds send before they kill
    SIGUSR1    what SLURM sends ahead of the time limit: #SBATCH --signal=USR1@300
    --stop-at  time after which to stop, from the start of this process
"""

import math
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

from megatron_bipe.errors import ConfigError

CONTINUE_LATER = 75  # exit code: saved, start me again; sysexits.h calls it a temporary failure
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_UNITS_S = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile("".join(rf"(?:(\d+){unit})?" for unit in _UNITS_S))

Item = TypeVar("Item")


class StopRequest:
    """Whether someone wants the run to stop here.

    Args:
        after_s: seconds from now after which it is to stop; infinity: never.
        clock: tells seconds.
    """

    def __init__(self, after_s: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._stop_at_s = clock, clock() + after_s
        self._signal: signal.Signals | None = None
        self._any: Callable[[bool], bool] = bool
        self._agreed = False

    def install_handlers(self) -> None:
        """Take the signals from now on; in place of ending the process they are remembered."""
        for number in SIGNALS:
            signal.signal(number, self._take)

    def remove_handlers(self) -> None:
        """Ignore the signals: launchers send one to the ranks that have not left yet when the first one has."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def agree_by(self, any_rank: Callable[[bool], bool]) -> None:
        """From now on all ranks decide together: `any_rank` says whether something is so on any of them."""
        self._any = any_rank

    @property
    def granted(self) -> bool:
        """Whether all ranks have agreed to stop."""
        return self._agreed

    @property
    def reason(self) -> str:
        """Why, on this rank; empty where it was not asked."""
        if self._signal is not None:
            return self._signal.name
        return "--stop-at" if self._clock() >= self._stop_at_s else ""

    def agreed(self) -> bool:
        """Ask all ranks, which call this together; once granted, it stays so."""
        self._agreed = self._agreed or self._any(bool(self.reason))
        return self._agreed

    def until(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, until a rank wants to stop, but at least the first; all ranks have equally many."""
        for number, item in enumerate(items):
            if number and self.agreed():
                return
            yield item

    def _take(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number)


def parse_duration(text: str) -> float:
    """Seconds of `23h50m`, `90m`, `1d12h`, `45s`.

    Raises:
        ConfigError: it is not of this form.
    """
    match = _DURATION.fullmatch(text)
    if not match or not text:
        raise ConfigError(
            f"{text!r} is no duration",
            remedy="Write days, hours, minutes and seconds as 1d2h30m5s",
            location="--stop-at",
        )
    return float(
        sum(int(number or 0) * unit_s for number, unit_s in zip(match.groups(), _UNITS_S.values(), strict=True))
    )
