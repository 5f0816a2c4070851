"""How far the workers of a download have come, and how they learn that it is over."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Self, TypeVar

from tqdm import tqdm

from preprocessing.progress import LINE_EVERY_S

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Stopped(Exception):  # noqa: N818 - no error: how a worker ends when another one, or the user, ended the run
    """The run is over."""


class Meter:
    """Bytes of all workers: a bar on a terminal, a line every half minute elsewhere; and how workers learn to stop."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self._what, self._total_bytes, self._done_bytes = what, total_bytes, 0
        self._began_s = self._last_line_s = time.monotonic()
        self._lock, self._stopped = threading.Lock(), threading.Event()
        hide = not sys.stderr.isatty() or not total_bytes
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=what, disable=hide)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, num_bytes: int) -> None:
        """Count more bytes, or fewer where some were thrown away.

        Raises:
            Stopped: after `stop`.
        """
        if self._stopped.is_set():
            raise Stopped
        with self._lock:
            self._done_bytes += num_bytes
            self._bar.update(num_bytes)
            if self._bar.disable and time.monotonic() - self._last_line_s >= LINE_EVERY_S:
                self._last_line_s = time.monotonic()
                log.info(self.line())

    def line(self) -> str:
        """One line for a log."""
        return tqdm.format_meter(
            self._done_bytes,
            self._total_bytes,
            time.monotonic() - self._began_s,
            prefix=self._what,
            unit="B",
            unit_scale=True,
            bar_format="{desc}: {percentage:.1f}%, {n_fmt}B of {total_fmt}B at {rate_fmt}, {remaining} left",
        )

    def wait(self, seconds: float) -> None:
        """Wait; raises `Stopped` at once when the run ends."""
        if self._stopped.wait(seconds):
            raise Stopped

    def stop(self) -> None:
        """End the workers at their next `add`."""
        self._stopped.set()


class FileBar:
    """What `http_get` takes for the class `tqdm`: hands the bytes of one file to the meter of all."""

    def __init__(self, meter: Meter, counted_bytes: int) -> None:
        self.meter = meter
        self._counted_bytes = counted_bytes

    def __call__(self, *, initial: int, **_: Any) -> Self:
        """Open a bar for a transfer that starts with `initial` bytes: fewer than counted where a part was dropped."""
        self.update(initial - self._counted_bytes)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, num_bytes: int) -> None:
        """Count bytes that arrived."""
        self._counted_bytes += num_bytes
        self.meter.add(num_bytes)


def in_parallel(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    note: Callable[[Item, Result], None],
    meter: Meter,
) -> None:
    """Do `work` in threads and `note` each result in this one; the first error ends all."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = {pool.submit(work, item): item for item in items}
            for future in as_completed(futures):
                note(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            meter.stop()
            raise
