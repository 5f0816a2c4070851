"""Exact distributions of segment and document lengths, and of segments per sequence, in little memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspection.verify import Advance, run_in_order
from megatron_bipe.data.shard import Shard
from megatron_bipe.data.shard_layout import IdxHeader, damaged_error
from megatron_bipe.io import unreadable_error
from megatron_bipe.types import IntArray

BLOCK_TOKENS = 1 << 20  # tokens read at once: a multiple of the sequence length, and much longer than a segment
SEQ_LEN_TOKENS = 1024  # sequence length in which segments are counted: that of the paper's training
SAMPLE_TOKENS = 1 << 28  # tokens counted per dataset by default, which takes about a second


@dataclass(frozen=True)
class Distribution:
    """Number of occurrences of each integer.

    Lengths that add up to T have at most sqrt(2 T) different values, so this stays small at any size of the data.
    """

    values_V: IntArray
    """Distinct values, from 0, ascending."""
    counts_V: IntArray

    @classmethod
    def of(cls, numbers: IntArray) -> Self:
        values_V, counts_V = np.unique(numbers, return_counts=True)
        return cls(values_V.astype(np.int64), counts_V.astype(np.int64))

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        values = np.concatenate([np.zeros(0, np.int64), *(part.values_V for part in parts)])
        counts = np.concatenate([np.zeros(0, np.int64), *(part.counts_V for part in parts)])
        values_V, positions = np.unique(values, return_inverse=True)
        counts_V = np.zeros(values_V.size, np.int64)
        np.add.at(counts_V, positions, counts)
        return cls(values_V, counts_V)

    @property
    def count(self) -> int:
        return int(self.counts_V.sum())

    @property
    def mean(self) -> float:
        return float(self.values_V @ self.counts_V) / self.count if self.count else float("nan")

    @property
    def maximum(self) -> int:
        return int(self.values_V[-1]) if self.count else 0

    def quantile(self, share: float) -> int:
        """Return the smallest value such that at least this share of the numbers does not exceed it; 0 if empty."""
        reached = np.searchsorted(np.cumsum(self.counts_V), share * self.count)
        return int(self.values_V[reached]) if self.count else 0

    def share_above(self, limit: int) -> float:
        """Return the share of the numbers that are larger than `limit`; 0 if empty."""
        return float(self.counts_V[self.values_V > limit].sum() / max(self.count, 1))

    def sum_share_above(self, limit: int) -> float:
        """Return the share of the total sum that comes from numbers larger than `limit`; 0 if the sum is 0."""
        sums_V = self.values_V * self.counts_V
        return float(sums_V[self.values_V > limit].sum() / max(int(sums_V.sum()), 1))

    def bins(self) -> dict[int, int]:
        """Return the counts of 0, 1, 2-3, 4-7, ... up to the maximum, by the lowest value of each bin."""
        exponents = np.frexp(self.values_V)[1]  # 0 for 0, 1 for 1, 2 for 2 and 3, ...
        counts = np.bincount(exponents, self.counts_V).astype(np.int64).tolist()
        return {(1 << exponent) >> 1: count for exponent, count in enumerate(counts)}


@dataclass(frozen=True)
class Statistics:
    """Counts of a dataset or a part of it."""

    tokens: int
    """Number of tokens that were counted."""
    segment_tokens: Distribution
    """Lengths of segments as stored: they continue across document ends and restart at each shard. Tokens after a
    shard's last segment end are not counted."""
    segments_per_sequence: Distribution
    """Segment ends in each sequence of `SEQ_LEN_TOKENS`, from the shard's start; its shorter last one is skipped."""
    document_tokens: Distribution
    """Lengths of documents."""

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
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
    """Count a dataset's segments and documents. It reads segment-end bits and document lengths, but no tokens.

    Args:
        dataset: dataset to count.
        max_tokens: number of tokens to count, in evenly spaced blocks of `BLOCK_TOKENS` that are the same in every
            call, with the same share of each shard's documents. Segments that began before such a block are skipped.
            None: count all.
        workers: number of shards that are read in parallel.
        advance: called with the number of tokens counted.

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
    """Return the number of blocks of a shard, at least 1: a shard without tokens may still have documents."""
    return max(-(-shard.num_tokens // BLOCK_TOKENS), 1)


def _count_shard(work: tuple[Shard, range], advance: Advance) -> Statistics:
    shard, chosen = work
    shard = Shard(shard.folder, shard.record or shard.name)  # a new reader, whose files are closed after this shard
    parts: list[Statistics] = []
    last_end: int | None = None
    for block in chosen:
        start = block * BLOCK_TOKENS
        stop = min(start + BLOCK_TOKENS, shard.num_tokens)
        if block == 0:
            last_end = -1
        elif chosen.step > 1:
            last_end = None  # the previous block was skipped
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
    """Return the number of tokens of documents [start, stop), reading only that part of the index."""
    path = shard.path("idx")
    offset = IdxHeader(shard.dtype, shard.num_documents).lengths_at + 4 * start
    try:
        lengths = np.fromfile(path, dtype="<i4", count=stop - start, offset=offset)
    except OSError as error:
        raise unreadable_error(path, error) from error
    if lengths.size != stop - start:
        raise damaged_error(path, f"the file ends inside field sequence lengths, after byte {offset}")
    if lengths.min(initial=0) < 0:
        wrong = int(np.argmax(lengths < 0))
        raise damaged_error(
            path, f"field sequence lengths, entry {start + wrong} (byte {offset + 4 * wrong}) is negative"
        )
    return lengths.astype(np.int64)
