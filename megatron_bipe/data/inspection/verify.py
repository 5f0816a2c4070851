"""Verification of complete datasets, and passes over shards that other inspections use, too.

Tokens and segment-end bits are read once, hashed and checked. Shards are processed by threads, since NumPy and hashlib
release the GIL and no data is then copied between processes.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_bipe.data.dataset import TokenDataset, open_tokenizer, token_out_of_range_error
from megatron_bipe.data.manifest import MANIFEST_NAME, ShardRecord
from megatron_bipe.data.segments import SegmentRule, fixed_length_ends, resolve_rule, segment_ends
from megatron_bipe.data.shard import Shard, TokenSource
from megatron_bipe.data.shard_layout import SEG_HEADER, SUFFIXES, Suffix, damaged_error, packed_bytes
from megatron_bipe.errors import DataError
from megatron_bipe.io import sha256_of, sha256_of_all, unreadable_error
from megatron_bipe.types import TokenArray

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], object]


CHUNK_TOKENS = 1 << 18  # a multiple of 8, so that chunks start at a byte; small enough for a core's private cache


def find_problems(
    datasets: Sequence[TokenDataset], *, workers: int = 1, sample: float = 1.0, advance: Advance = lambda _: None
) -> Iterator[DataError]:
    """Check everything that opening a dataset does not: tokenizer, checksums, indices, ids and segment-end bits.

    Args:
        datasets: open datasets, whose sizes and headers are therefore already checked.
        workers: number of shards read in parallel. Each needs a few MB, plus about 30 bytes per document of its shard.
        sample: share of the tokens, in chunks chosen by a fixed hash, whose ids are checked and whose bits are compared
            with a new segmentation. Checksums, indices and counts always cover everything.
        advance: called with the number of bytes read.

    Yields:
        An error for each dataset whose tokenizer or rule is wrong; then, in the order of the shards, one for each wrong
        checksum and for the first other problem of each shard.
    """
    for dataset in datasets:
        yield from _tokenizer_problems(dataset)
    work = [(dataset, shard.record) for dataset in datasets for shard in dataset.shards if shard.record]
    for problems in run_in_order(partial(_shard_problems, sample=sample), work, workers, advance):
        yield from problems


def check_checksums(dataset: TokenDataset) -> None:
    """Verify the checksums of all files of a dataset, several at a time; ids and bits are not compared.

    Raises:
        DataError: a file is missing or was changed after it was written.
    """
    files = [(shard, suffix) for shard in dataset.shards for suffix in SUFFIXES]
    hashes = sha256_of_all(shard.path(suffix) for shard, suffix in files)
    for shard, suffix in files:
        try:
            check_checksum(shard, suffix, next(hashes))
        except OSError as error:
            raise unreadable_error(shard.path(suffix), error) from error


def check_checksum(shard: Shard, suffix: Suffix, found: str) -> None:
    """Raise DataError if the SHA-256 of a shard's file, computed by the caller, is not that of the manifest."""
    assert shard.record is not None  # shards of a dataset have one
    expected = shard.record.files[suffix].sha256
    if found != expected:
        raise damaged_error(shard.path(suffix), f"its SHA-256 is {found}; the manifest says {expected}")


def _tokenizer_problems(dataset: TokenDataset) -> Iterator[DataError]:
    try:
        rule = resolve_rule(dataset.rule.spec, open_tokenizer(dataset))
    except DataError as error:
        yield error
        return
    if rule != dataset.rule:
        yield DataError(
            f"field rule.token_ids lists {len(dataset.rule.token_ids)} ids; rule {rule.spec!r} resolves to "
            f"{len(rule.token_ids)} others with the dataset's own tokenizer",
            remedy="Make the dataset again",
            location=dataset.path / MANIFEST_NAME,
        )


def _shard_problems(work: tuple[TokenDataset, ShardRecord], advance: Advance, sample: float) -> list[DataError]:
    dataset, record = work
    try:
        shard = Shard(dataset.path, record)  # a new reader, so that the dataset does not keep its index in memory
        found: dict[Suffix, str] = {"idx": _checksum(shard.path("idx"))}
        advance(record.files["idx"].bytes)
        check = _ShardCheck(Segmenter(shard, dataset.rule, dataset.manifest.tokenizer.vocab_size), record, sample)
        with _HashedFile(shard.path("bin")) as tokens, _HashedFile(shard.path("seg")) as bits:
            bits.read(SEG_HEADER.size)
            advance(SEG_HEADER.size)
            for start in range(0, shard.num_tokens, CHUNK_TOKENS):
                count = min(CHUNK_TOKENS, shard.num_tokens - start)
                tokens_T = tokens.read(count * shard.dtype.itemsize).view(shard.dtype)
                packed = bits.read(packed_bytes(count))
                check.chunk(start, tokens_T, packed)
                advance(tokens_T.nbytes + packed.nbytes)
            found |= {"bin": tokens.hexdigest(), "seg": bits.hexdigest()}
    except DataError as error:  # removed or truncated since it was opened, or unreadable
        return [error]
    problems = [
        damaged_error(
            shard.path(suffix), f"its SHA-256 is {found[suffix]}; the manifest says {record.files[suffix].sha256}"
        )
        for suffix in SUFFIXES
        if found[suffix] != record.files[suffix].sha256
    ]
    return problems + check.finish()


@dataclass(frozen=True)
class Segmenter:
    """A segment rule applied to one shard."""

    shard: TokenSource
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


class _ShardCheck:
    """Check of a shard's content, which ends at the first problem."""

    def __init__(self, segmenter: Segmenter, record: ShardRecord, sample: float) -> None:
        self._segmenter, self._record, self._sample = segmenter, record, sample
        self._shard = segmenter.shard
        self._num_segments = 0
        self._problem: DataError | None = None
        try:
            _ = self._shard.document_bounds
        except DataError as error:
            self._problem = error

    def chunk(self, start: int, tokens_T: npt.NDArray[np.generic], packed: npt.NDArray[np.uint8]) -> None:
        """Check the tokens from `start` on and their stored bits."""
        if self._problem is None:
            try:
                self._check_padding(start + tokens_T.size, int(packed[-1]))
                if _is_sampled(self._record.name, start, self._sample):
                    self._compare(start, tokens_T, packed)
            except DataError as error:
                self._problem = error
        self._num_segments += int(np.bitwise_count(packed).sum())

    def finish(self) -> list[DataError]:
        """Return the first problem, if there is one."""
        if self._problem is None and self._num_segments != self._record.segments:
            what = f"{self._num_segments} bits are set; the manifest says {self._record.segments} segments"
            self._problem = damaged_error(self._shard.path("seg"), what)
        return [self._problem] if self._problem else []

    def _check_padding(self, stop: int, last_byte: int) -> None:
        if stop % 8 and last_byte >> stop % 8:
            last = SEG_HEADER.size + stop // 8
            raise damaged_error(
                self._shard.path("seg"), f"byte {last}, the last, has bits set beyond the {stop} tokens"
            )

    def _compare(self, start: int, tokens_T: npt.NDArray[np.generic], packed: npt.NDArray[np.uint8]) -> None:
        expected = self._segmenter.packed_ends(tokens_T, start)
        if np.array_equal(expected, packed):
            return
        wrong = int(np.flatnonzero(np.unpackbits(expected ^ packed, bitorder="little"))[0])
        position, bit = start + wrong, int(packed[wrong // 8]) >> wrong % 8 & 1
        found = f"byte {SEG_HEADER.size + position // 8}, bit {position % 8} (token {position}, id {tokens_T[wrong]})"
        what = f"{found} is {bit}; rule {self._segmenter.rule.spec!r} makes it {1 - bit}"
        raise damaged_error(self._shard.path("seg"), what)


def _is_sampled(name: str, start: int, share: float) -> bool:
    """Return True if a chunk is in the sample, which is always the same and contained in every larger sample."""
    digest = hashlib.blake2b(f"{name}:{start}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def _checksum(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise unreadable_error(path, error) from error


class _HashedFile:
    """A file that is read sequentially into a reused buffer while its SHA-256 is computed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sha256 = hashlib.sha256()
        self._buffer = bytearray()
        try:
            self._stream = path.open("rb")
        except OSError as error:
            raise unreadable_error(path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def read(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Return the next bytes, valid until the next call; raise a DataError if there are fewer."""
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(num_bytes)
        view = memoryview(self._buffer)[:num_bytes]
        try:
            count = self._stream.readinto(view)
            position = self._stream.tell()
        except OSError as error:
            raise unreadable_error(self._path, error) from error
        if count != num_bytes:
            raise damaged_error(self._path, f"the file ends at byte {position}; it was longer when it was opened")
        self._sha256.update(view)
        return np.frombuffer(view, dtype=np.uint8)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


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
