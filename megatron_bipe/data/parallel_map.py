"""Parallel processing of shards, with results in the order of the shards.

It uses threads, since NumPy and hashlib release the GIL and no data is then copied between processes.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], object]


def run_in_order(
    run: Callable[[Item, Advance], Result], items: Sequence[Item], workers: int, advance: Advance
) -> Iterator[Result]:
    """Yield the results of `run(item, advance)`. An exception in `run` is raised in the item's turn and stops the rest.

    Args:
        run: must call `advance` every few milliseconds; the call raises if the results are no longer needed.
        items: inputs of `run`.
        workers: number of threads.
        advance: called with the amount of work done, by one thread at a time.
    """
    stopping = threading.Event()
    advance_lock = threading.Lock()

    def advance_or_stop(amount: int) -> None:
        if stopping.is_set():
            raise _StoppedError
        with advance_lock:
            advance(amount)

    pool = ThreadPoolExecutor(workers)
    try:
        for future in [pool.submit(run, item, advance_or_stop) for item in items]:
            yield future.result()
    finally:  # also when the caller was interrupted
        stopping.set()
        pool.shutdown(cancel_futures=True)


class _StoppedError(Exception):
    """Stops a worker whose result is no longer needed."""
