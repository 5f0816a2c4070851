"""Segment-end bits of a shard, made from its tokens a chunk at a time: to write them, or to compare them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_bipe.data.dataset import foreign_token
from megatron_bipe.data.segments import SegmentRule, segment_ends
from megatron_bipe.data.shard import Shard
from megatron_bipe.types import BoolArray, IntArray, TokenArray

CHUNK_TOKENS = 1 << 18  # a multiple of 8, so that chunks start with a byte; small enough for a core's own cache


@dataclass(frozen=True)
class Segmenter:
    """A rule at work on one shard.

    Args:
        shard: whose tokens they are.
        rule: what closes a segment.
        vocab_size: number of ids that a token can have.
    """

    shard: Shard
    rule: SegmentRule
    vocab_size: int

    def packed_ends(self, tokens_T: TokenArray, start: int) -> npt.NDArray[np.uint8]:
        """Bits of some tokens as the format stores them, uint8 [ceil(T / 8)].

        Args:
            tokens_T: in the storage type.
            start: number of the first of them in the shard, a multiple of 8.

        Raises:
            DataError: an id that the vocabulary does not have; under `fixed:N` also a damaged index.
        """
        # As unsigned numbers negative ids are large, so one bound is enough.
        unsigned_T = tokens_T.view(f"u{tokens_T.dtype.itemsize}")
        if int(unsigned_T.max(initial=0)) >= self.vocab_size:
            position = int(np.argmax(unsigned_T >= self.vocab_size))
            raise foreign_token(self.shard, start + position, int(tokens_T[position]), self.vocab_size)
        length = self.rule.fixed_length
        if length is None:  # the rule looks at tokens alone and does not care where documents start
            ends_T = segment_ends(tokens_T, self.rule)
        else:
            ends_T = fixed_ends(self.shard.document_bounds, length, start, start + tokens_T.size)
        return np.packbits(ends_T, bitorder="little")


def fixed_ends(bounds_D1: IntArray, length: int, start: int, stop: int) -> BoolArray:
    """Every `length`-th token of each document, as far as they lie among tokens [start, stop).

    Args:
        bounds_D1: first token of each document and the end of the last.
        length: of a segment.
        start: first token looked at.
        stop: end of what is looked at.
    """
    ends_T = np.zeros(stop - start, dtype=np.bool_)
    first = max(int(np.searchsorted(bounds_D1, start, side="right")) - 1, 0)
    last = int(np.searchsorted(bounds_D1, stop, side="left"))
    begins_D, limits_D = bounds_D1[first:last], np.minimum(bounds_D1[first + 1 : last + 1], stop)
    passed_D = np.maximum(start - begins_D, 0) // length  # segments that end before `start`
    first_ends_D = begins_D + (passed_D + 1) * length - 1
    counts_D = np.maximum((limits_D - first_ends_D - 1) // length + 1, 0)
    nth = np.arange(int(counts_D.sum())) - np.repeat(np.cumsum(counts_D) - counts_D, counts_D)
    ends_T[np.repeat(first_ends_D, counts_D) + nth * length - start] = True
    return ends_T
