"""Convert one range of the inputs to shards, in one pass and independently of other ranges."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from megatron_bipe.data.shard import ShardWriter
from megatron_bipe.errors import DataError
from megatron_bipe.types import BoolArray, Document, IntArray
from preprocessing.destinations import Destination, HashRows, hash_rows, load_duplicates, save_hashes
from preprocessing.document_tokenizer import (
    BackendName,
    DocumentTokenizer,
    Recipe,
    TokenizedDocuments,
    TokenizerDifferenceError,
)
from preprocessing.line_counts import MALFORMED_NAMED, printable
from preprocessing.readers.documents import DocumentReader, PieceEnd
from preprocessing.readers.inputs import Piece
from preprocessing.readers.parse import Keys, Malformed, Parsed
from preprocessing.work_dir import STOCK_NAME, RangeRecord, RangeShard, WorkFolder

MAX_DATASETS = 1000  # each keeps a file open; a key with more values is probably a mistake

Advance = Callable[[int, int], object]  # called with bytes read from disk and bytes of text, for the time left

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Inputs and options that every worker needs."""

    output: Path
    ranges: list[list[Piece]]
    keys: Keys
    max_line_bytes: int
    recipe: Recipe
    shard_tokens: int  # a shard is closed before the document that would exceed this
    drop_duplicates: bool
    fall_back: bool  # to the stock tokenizer, if the fast one gives wrong ids


class RangeWorker:
    """Worker that processes ranges one after the other, in one process."""

    def __init__(self, job: Job, advance: Advance) -> None:
        self._job, self._advance = job, advance
        self._work = WorkFolder(job.output)
        self._reader = DocumentReader(job.keys, job.max_line_bytes)
        self._tokenizer: DocumentTokenizer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__()

    def hash_texts(self, number: int) -> None:
        """Save the hashes of a range's texts: the first pass if duplicates are dropped."""
        hashes: list[HashRows] = []
        for piece in self._job.ranges[number]:
            for parsed in self._reader.read(piece):
                hashes.append(hash_rows(document.text for document in parsed.documents))
                self._advance(parsed.read_bytes, 0)
        with self._work.writing():
            save_hashes(self._work.range_folder(number), hashes)

    def tokenize(self, number: int) -> None:
        """Write a range's shards and, last, its record.

        Raises:
            DataError: the input cannot be read, the fast tokenizer gave wrong ids, or the disk is full.
        """
        if self._tokenizer is None:
            self._tokenizer = DocumentTokenizer(self._job.recipe)
        try:
            self._tokenize(number, self._tokenizer)
        except TokenizerDifferenceError as error:
            self._work.mark(STOCK_NAME)  # the next run may not happen to compare this document
            if not self._job.fall_back:
                raise
            log.warning("Continuing with the stock tokenizer. %s", error)
            self._tokenizer = DocumentTokenizer(replace(self._job.recipe, backend="stock"))
            self._tokenize(number, self._tokenizer)

    def _tokenize(self, number: int, tokenizer: DocumentTokenizer) -> None:
        folder = self._work.range_folder(number)
        is_duplicate = load_duplicates(folder) if self._job.drop_duplicates else None
        counts = _Counts()
        with self._work.writing(), _RangeWriter(folder, tokenizer.dtype, self._job.shard_tokens) as writer:
            for index, piece in enumerate(self._job.ranges[number]):
                for parsed in self._reader.read(piece):
                    counts.add(parsed, index)
                    documents = counts.drop_duplicates(parsed.documents, is_duplicate)
                    text_bytes = 0
                    if documents:
                        tokenized = tokenizer(documents)
                        writer.add(tokenized)
                        text_bytes = int(tokenized.text_bytes_D.sum())
                    self._advance(parsed.read_bytes, text_bytes)
                counts.ends.append(self._reader.end)
            self._work.save_range(number, counts.record(writer.finish(), tokenizer.backend))


@dataclass
class _Counts:
    """Counts of a range so far, under the names of its record."""

    ends: list[PieceEnd] = field(default_factory=list)
    lines: int = 0
    documents: int = 0
    empty: int = 0
    duplicates: int = 0
    malformed: int = 0
    first_malformed: list[Malformed] = field(default_factory=list)
    malformed_pieces: list[int] = field(default_factory=list)

    def add(self, parsed: Parsed, piece: int) -> None:
        named = parsed.malformed[: MALFORMED_NAMED - len(self.first_malformed)]
        self.first_malformed += [line._replace(file=printable(line.file)) for line in named]
        self.malformed_pieces += [piece] * len(named)
        self.lines += parsed.num_lines
        self.empty += parsed.num_empty
        self.malformed += len(parsed.malformed)

    def drop_duplicates(self, documents: list[Document], is_duplicate: BoolArray | None) -> list[Document]:
        """Count documents, and return those that are not marked in the mask over all texts of the range."""
        kept = documents
        if is_duplicate is not None:
            first = self.documents + self.duplicates
            marks = is_duplicate[first : first + len(documents)].tolist()
            kept = [document for document, mark in zip(documents, marks, strict=True) if not mark]
        self.documents += len(kept)
        self.duplicates += len(documents) - len(kept)
        return kept

    def record(self, shards: list[RangeShard], backend: BackendName) -> RangeRecord:
        return RangeRecord(shards=tuple(shards), backend=backend, **vars(self))


class _RangeWriter:
    """Shards of a range, one open for each destination."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._open: dict[Destination, ShardWriter] = {}
        self._order: list[Destination] = []  # destination of each shard, by its number
        self._done: dict[int, RangeShard] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()  # removes unfinished shards

    def add(self, batch: TokenizedDocuments) -> None:
        for destination in dict.fromkeys(batch.destinations):
            indices = [n for n, found in enumerate(batch.destinations) if found == destination]
            while indices:
                count = self._room_for(destination, batch.lengths_D[indices])
                self._append(destination, batch, indices[:count])
                indices = indices[count:]

    def finish(self) -> list[RangeShard]:
        """Close all shards, and return them by number."""
        for destination in list(self._open):
            self._close(destination)
        return [self._done[number] for number in range(len(self._order))]

    def _room_for(self, destination: Destination, lengths_D: IntArray) -> int:
        """Return how many documents fit into the open shard, at least one; open another shard if it is full."""
        writer = self._open.get(destination)
        if writer is not None and writer.num_tokens + lengths_D[0] > self._shard_tokens:
            self._close(destination)
            writer = None
        if writer is None:
            writer = self._begin(destination)
        return max(int(np.searchsorted(np.cumsum(lengths_D), self._shard_tokens - writer.num_tokens, "right")), 1)

    def _append(self, destination: Destination, batch: TokenizedDocuments, indices: list[int]) -> None:
        lengths_D, text_bytes = batch.lengths_D[indices], int(batch.text_bytes_D[indices].sum())
        tokens_T, ends_T = batch.tokens_T, batch.ends_T
        if len(indices) < len(batch.destinations):
            stops = np.cumsum(batch.lengths_D)[indices]
            spans = [slice(stop - size, stop) for stop, size in zip(stops, lengths_D, strict=True)]
            tokens_T = np.concatenate([tokens_T[span] for span in spans])
            ends_T = np.concatenate([ends_T[span] for span in spans])
        self._open[destination].append(tokens_T, ends_T, lengths_D, text_bytes)

    def _begin(self, destination: Destination) -> ShardWriter:
        if len({*self._order, destination}) > MAX_DATASETS:
            raise DataError(
                f"The output has more than {MAX_DATASETS} partitions, or splits of partitions; the last value seen is "
                f"{destination.partition!r}",
                remedy="Partition by a key with few values, such as meta.pile_set_name",
                location="--partition-by",
            )
        writer = ShardWriter(self._folder, f"{len(self._order):03d}", self._dtype)
        self._order.append(destination)
        self._open[destination] = self._undo.enter_context(writer)
        return writer

    def _close(self, destination: Destination) -> None:
        shard = self._open.pop(destination).finish()
        self._done[int(shard.name)] = RangeShard(destination=destination, shard=shard)
