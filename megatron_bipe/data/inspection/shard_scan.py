"""Passes over the shards of a dataset: in parallel, with results in their order, and segment-end bits chunk by chunk.

Shards are processed by threads, since NumPy and hashlib release the GIL and no data is then copied between processes.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from megatron_bipe.data.dataset import token_out_of_range_error
from megatron_bipe.data.segments import SegmentRule, fixed_length_ends, segment_ends
from megatron_bipe.data.shard import Shard
from megatron_bipe.types import TokenArray

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


CHUNK_TOKENS = 1 << 18  # a multiple of 8, so that chunks start at a byte; small enough for a core's private cache


@dataclass(frozen=True)
class Segmenter:
    """A segment rule applied to one shard."""

    shard: Shard
    rule: SegmentRule
    vocab_size: int

    def packed_ends(self, tokens_T: TokenArray, start: int) -> npt.NDArray[np.uint8]:
        """Return the segment-end bits of a contiguous slice of the shard, uint8 [ceil(T / 8)], in the stored format.

        Raise DataError if an id is outside the vocabulary or, for `fixed:N`, the index is damaged.

        Args:
            tokens_T: the slice, in the storage dtype.
            start: position of the slice in the shard, a multiple of 8.
        """
        # Negative ids are large as unsigned numbers, so one bound is enough.
        unsigned_T = tokens_T.view(f"u{tokens_T.dtype.itemsize}")
        if int(unsigned_T.max(initial=0)) >= self.vocab_size:
            position = int(np.argmax(unsigned_T >= self.vocab_size))
            raise token_out_of_range_error(self.shard, start + position, int(tokens_T[position]), self.vocab_size)
        length = self.rule.fixed_length
        if length is None:  # the rule depends on tokens alone, not on where documents start
            ends_T = segment_ends(tokens_T, self.rule)
        else:
            ends_T = fixed_length_ends(self.shard.document_bounds, length, start, start + tokens_T.size)
        return np.packbits(ends_T, bitorder="little")
