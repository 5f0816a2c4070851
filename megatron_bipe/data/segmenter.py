"""Computation of a shard's segment-end bits from its tokens, chunk by chunk, to write or to verify them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_bipe.data.dataset import token_out_of_range_error
from megatron_bipe.data.segments import SegmentRule, segment_ends
from megatron_bipe.data.shard import Shard
from megatron_bipe.types import BoolArray, IntArray, TokenArray

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


def fixed_length_ends(bounds_D1: IntArray, length: int, start: int, stop: int) -> BoolArray:
    """Mark every `length`-th token of each document, for tokens [start, stop); `bounds_D1` holds document bounds."""
    ends_T = np.zeros(stop - start, dtype=np.bool_)
    first = max(int(np.searchsorted(bounds_D1, start, side="right")) - 1, 0)
    last = int(np.searchsorted(bounds_D1, stop, side="left"))
    begins_D, limits_D = bounds_D1[first:last], np.minimum(bounds_D1[first + 1 : last + 1], stop)
    closed_D = np.maximum(start - begins_D, 0) // length  # segments that end before `start`
    first_ends_D = begins_D + (closed_D + 1) * length - 1
    counts_D = np.maximum((limits_D - first_ends_D - 1) // length + 1, 0)
    nth = np.arange(int(counts_D.sum())) - np.repeat(np.cumsum(counts_D) - counts_D, counts_D)
    ends_T[np.repeat(first_ends_D, counts_D) + nth * length - start] = True
    return ends_T
