"""Many shards at once, results in the shards' order.

In threads: NumPy and hashlib let go of the interpreter while they work, and nothing need be copied between processes.
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
    """Results of `run(item, advance)`. What `run` raises is raised here, in the item's turn, and ends the others.

    Args:
        run: is to call `advance` every few milliseconds: where it is stopped if the results are no longer wanted.
        items: what to run on.
        workers: threads.
        advance: told how much was done, by one thread at a time.
    """
    unwanted = threading.Event()
    one_at_a_time = threading.Lock()

    def advance_or_stop(amount: int) -> None:
        if unwanted.is_set():
            raise _UnwantedError
        with one_at_a_time:
            advance(amount)

    pool = ThreadPoolExecutor(workers)
    try:
        for future in [pool.submit(run, item, advance_or_stop) for item in items]:
            yield future.result()
    finally:  # also when the caller was interrupted
        unwanted.set()
        pool.shutdown(cancel_futures=True)


class _UnwantedError(Exception):
    """Nobody waits for this result any more."""
