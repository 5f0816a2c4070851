"""How long segments and documents are, and how many segments a window holds: exact counts, in little memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.parallel_map import Advance, run_in_order
from megatron_bipe.data.shard import Shard
from megatron_bipe.data.shard_layout import IdxHeader, damaged
from megatron_bipe.io import unreadable
from megatron_bipe.types import IntArray

BLOCK_TOKENS = 1 << 20  # read together: a multiple of the window, and long against a segment
SEQ_LEN_TOKENS = 1024  # that segments are counted in: the paper's training length
SAMPLE_TOKENS = 1 << 28  # of a dataset, about a second's work


@dataclass(frozen=True)
class Distribution:
    """How often each whole number occurs.

    Lengths that add up to T have at most sqrt(2 T) different values, so this stays small at any size of the data.
    """

    values_V: IntArray
    """From 0, ascending, each once."""
    counts_V: IntArray

    @classmethod
    def of(cls, numbers: IntArray) -> Self:
        """Count some numbers."""
        values_V, counts_V = np.unique(numbers, return_counts=True)
        return cls(values_V.astype(np.int64), counts_V.astype(np.int64))

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """One of all."""
        values = np.concatenate([np.zeros(0, np.int64), *(part.values_V for part in parts)])
        counts = np.concatenate([np.zeros(0, np.int64), *(part.counts_V for part in parts)])
        values_V, positions = np.unique(values, return_inverse=True)
        counts_V = np.zeros(values_V.size, np.int64)
        np.add.at(counts_V, positions, counts)
        return cls(values_V, counts_V)

    @property
    def count(self) -> int:
        """How many numbers were counted."""
        return int(self.counts_V.sum())

    @property
    def mean(self) -> float:
        """Their mean, NaN of none."""
        return float(self.values_V @ self.counts_V) / self.count if self.count else float("nan")

    @property
    def maximum(self) -> int:
        """The largest, 0 of none."""
        return int(self.values_V[-1]) if self.count else 0

    def quantile(self, share: float) -> int:
        """The smallest number that this share of all numbers does not exceed; 0 of none."""
        reached = np.searchsorted(np.cumsum(self.counts_V), share * self.count)
        return int(self.values_V[reached]) if self.count else 0

    def share_above(self, limit: int) -> float:
        """Share of the numbers that are larger than `limit`, 0 of none."""
        return float(self.counts_V[self.values_V > limit].sum() / max(self.count, 1))

    def sum_share_above(self, limit: int) -> float:
        """Share that the numbers larger than `limit` have in the sum of all; 0 where that is 0."""
        sums_V = self.values_V * self.counts_V
        return float(sums_V[self.values_V > limit].sum() / max(int(sums_V.sum()), 1))

    def bins(self) -> dict[int, int]:
        """Counts of 0, 1, 2-3, 4-7, ... up to the largest, empty ones too, by the lowest number of each."""
        exponents = np.frexp(self.values_V)[1]  # 0 of 0, 1 of 1, 2 of 2 and 3, ...
        counts = np.bincount(exponents, self.counts_V).astype(np.int64).tolist()
        return {(1 << exponent) >> 1: count for exponent, count in enumerate(counts)}


@dataclass(frozen=True)
class Statistics:
    """What was counted of a dataset or a part of it."""

    tokens: int
    """That were looked at."""
    segment_tokens: Distribution
    """Lengths of segments, as stored: they run on over the ends of documents, start afresh with each shard, and what
    follows a shard's last segment end is none."""
    segments_per_sequence: Distribution
    """Segment ends in each window of `WINDOW_TOKENS`, counted from a shard's start, its shorter last one left out."""
    document_tokens: Distribution
    """Lengths of documents."""

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """One of all."""
        return cls(
            tokens=sum(part.tokens for part in parts),
            segment_tokens=Distribution.merge([part.segment_tokens for part in parts]),
            segments_per_sequence=Distribution.merge([part.segments_per_sequence for part in parts]),
            document_tokens=Distribution.merge([part.document_tokens for part in parts]),
        )


def count_dataset(
    dataset: TokenDataset,
    max_tokens: int | None = SAMPLE_TOKENS,
    *,
    workers: int = 1,
    advance: Advance = lambda _: None,
) -> Statistics:
    """Count a dataset's segments and documents; reads bits and document lengths, no tokens.

    Args:
        dataset: an opened dataset.
        max_tokens: to look at: evenly spread blocks of `BLOCK_TOKENS`, always the same ones, and the same share of each
            shard's documents. Segments that began before such a block are left out. None: all.
        workers: shards that are read at once.
        advance: told the tokens that have been looked at.

    Raises:
        DataError: a shard cannot be read.
    """
    per_shard = [blocks_of(shard) for shard in dataset.shards]
    stride = 1
    if max_tokens is not None and dataset.num_tokens > max_tokens:
        stride = -(-sum(per_shard) * BLOCK_TOKENS // max(max_tokens, BLOCK_TOKENS))
    work, seen = [], 0
    for shard, blocks in zip(dataset.shards, per_shard, strict=True):
        work.append((shard, range(-seen % stride, blocks, stride)))
        seen += blocks
    return Statistics.merge(list(run_in_order(_count_shard, work, workers, advance)))


def blocks_of(shard: Shard) -> int:
    """Blocks of a shard; one that has no tokens may still have documents."""
    return max(-(-shard.num_tokens // BLOCK_TOKENS), 1)


def _count_shard(work: tuple[Shard, range], advance: Advance) -> Statistics:
    shard, chosen = work
    shard = Shard(shard.folder, shard.record or shard.name)  # whose files are closed when it has been counted
    parts: list[Statistics] = []
    last_end: int | None = None
    for block in chosen:
        start = block * BLOCK_TOKENS
        stop = min(start + BLOCK_TOKENS, shard.num_tokens)
        if block == 0:
            last_end = -1
        elif chosen.step > 1:
            last_end = None  # the block before has not been looked at
        positions = np.flatnonzero(shard.ends(start, stop)) + start
        known = positions if last_end is None else np.concatenate([[last_end], positions])
        sequences = (stop - start) // SEQ_LEN_TOKENS
        packed = shard.packed_ends(start // 8, start // 8 + sequences * SEQ_LEN_TOKENS // 8)
        documents = [shard.num_documents * edge // blocks_of(shard) for edge in (block, block + 1)]
        parts.append(
            Statistics(
                tokens=stop - start,
                segment_tokens=Distribution.of(np.diff(known)),
                segments_per_sequence=Distribution.of(
                    np.bitwise_count(packed).reshape(-1, SEQ_LEN_TOKENS // 8).sum(axis=1)
                ),
                document_tokens=Distribution.of(_document_lengths(shard, *documents)),
            )
        )
        last_end = int(positions[-1]) if positions.size else last_end
        advance(stop - start)
    return Statistics.merge(parts)


def _document_lengths(shard: Shard, start: int, stop: int) -> IntArray:
    """Tokens of documents [start, stop), from the index alone, of which nothing else is read."""
    path = shard.path("idx")
    offset = IdxHeader(shard.dtype, shard.num_documents).lengths_at + 4 * start
    try:
        lengths = np.fromfile(path, dtype="<i4", count=stop - start, offset=offset)
    except OSError as error:
        raise unreadable(path, error) from error
    if lengths.size != stop - start:
        raise damaged(path, f"the file ends inside field sequence lengths, after byte {offset}")
    if lengths.min(initial=0) < 0:
        wrong = int(np.argmax(lengths < 0))
        raise damaged(path, f"field sequence lengths, entry {start + wrong} (byte {offset + 4 * wrong}) is negative")
    return lengths.astype(np.int64)
