"""Progress and cancellation of the threads of a download."""

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


class Stopped(Exception):  # noqa: N818 - not an error: it ends a worker when another one, or the user, ended the run
    """Signal to a worker that the run has ended."""


class Meter:
    """Bytes of all workers, as a bar on a terminal or a log line every half minute; also stops the workers."""

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
        """Count bytes, a negative number for discarded ones; raise `Stopped` after `stop`."""
        if self._stopped.is_set():
            raise Stopped
        with self._lock:
            self._done_bytes += num_bytes
            self._bar.update(num_bytes)
            if self._bar.disable and time.monotonic() - self._last_line_s >= LINE_EVERY_S:
                self._last_line_s = time.monotonic()
                log.info(self.line())

    def line(self) -> str:
        """Return the progress as one log line."""
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
        """Wait; raise `Stopped` as soon as the run ends."""
        if self._stopped.wait(seconds):
            raise Stopped

    def stop(self) -> None:
        self._stopped.set()


class FileBar:
    """Substitute for the class `tqdm` in `http_get`: adds the bytes of one file to the meter of all."""

    def __init__(self, meter: Meter, counted_bytes: int) -> None:
        self.meter = meter
        self._counted_bytes = counted_bytes

    def __call__(self, *, initial: int, **_: Any) -> Self:
        """Start a transfer at `initial` bytes, which are fewer than counted if a partial file was discarded."""
        self.update(initial - self._counted_bytes)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, num_bytes: int) -> None:
        self._counted_bytes += num_bytes
        self.meter.add(num_bytes)


def run_in_threads(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    note: Callable[[Item, Result], None],
    meter: Meter,
) -> None:
    """Run `work` in threads, and `note` with each result in this one; the first error stops all."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = {pool.submit(work, item): item for item in items}
            for future in as_completed(futures):
                note(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            meter.stop()
            raise
