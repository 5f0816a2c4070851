"""Reader of Megatron's indexed datasets, pairs NAME.bin and NAME.idx, that other programs made.

It accepts more than `data.shard`, which reads the files of this project: every integer type, documents of several
sequences, and the index of GPT-NeoX's merged files, which lists no documents.
"""

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bipe.data.shard_layout import (
    IDX_HEADER,
    IDX_MAGIC,
    IDX_VERSION,
    MAX_DOCUMENT_TOKENS,
    PAIR_SUFFIXES,
    IdxHeader,
    Suffix,
    shard_path,
)
from megatron_bipe.errors import DataError
from megatron_bipe.io import unreadable_error
from megatron_bipe.types import BoolArray, IntArray, TokenArray

DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
FLOAT_CODES = (6, 7)  # of these, Megatron-LM and GPT-NeoX use either for either size
OLD_MAGIC = b"TNTIDX\0\0"
MAX_NAMES_IN_MESSAGE = 8
COPY_AGAIN = "Copy both files again, or make the pair again"
_ENDINGS = tuple(f".{suffix}" for suffix in PAIR_SUFFIXES)

_log = logging.getLogger(__name__)


class MegatronPair:
    """One pair of files. Opening reads the header of the index; `document_bounds` reads and validates its arrays.

    Args:
        prefix: path of both files without suffix, as Megatron's `--data-path` has it.

    Raises:
        DataError: a file is missing or damaged, or the pair does not hold the tokens of documents.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        try:
            sizes = {suffix: self.path(suffix).stat().st_size for suffix in PAIR_SUFFIXES}
            with self.path("idx").open("rb") as stream:
                head = stream.read(IDX_HEADER.size)
        except OSError as error:
            raise unreadable_error(Path(error.filename), error) from error
        self.dtype, self.num_sequences, self._num_entries = self._parse(head, sizes["idx"])
        self._index = IdxHeader(self.dtype, self.num_sequences)
        self.num_tokens, rest = divmod(sizes["bin"], self.dtype.itemsize)
        if rest:
            what = f"the file has {sizes['bin']} bytes, which is not a multiple of the {self.dtype.itemsize} bytes of "
            raise self._error("bin", f"{what}{self.dtype.name}, the type of {self.path('idx').name}")

    def __reduce__(self) -> tuple[type["MegatronPair"], tuple[Path]]:
        """Support pickling and copying without the index in memory."""
        return type(self), (self.prefix,)

    @property
    def name(self) -> str:
        return self.prefix.name

    def path(self, suffix: Suffix) -> Path:
        return shard_path(self.prefix.parent, self.name, suffix)

    def tokens(self, start: int, stop: int) -> TokenArray:
        """Read tokens [start, stop) in the type of the file."""
        try:
            tokens = np.fromfile(self.path("bin"), self.dtype, stop - start, offset=start * self.dtype.itemsize)
        except OSError as error:
            raise unreadable_error(self.path("bin"), error) from error
        if tokens.size != stop - start:
            what = f"the file ends after {start + tokens.size} tokens; it had {self.num_tokens} when it was opened"
            raise self._error("bin", what)
        return tokens

    @cached_property
    def has_one_sequence_per_document(self) -> bool:
        """True if the index lists the documents 0, 1, ..., as this project's shards do."""
        is_complete = self._num_entries == self.num_sequences + 1
        return is_complete and np.array_equal(self._sequences_of_documents(), np.arange(self.num_sequences + 1))

    @cached_property
    def document_bounds(self) -> IntArray:
        """First token of each document and the end of the last, int64 [documents + 1]; validates the index.

        The sequences of a document are joined. If the index has no document entries but the first, which is 0, each
        sequence is a document: GPT-NeoX writes such an index when it merges files.
        """
        lengths = self._read("<i4", self._index.lengths_at, self.num_sequences)
        self._check_entries(lengths >= 0, "sequence lengths", lengths, "is negative")
        bounds = np.zeros(self.num_sequences + 1, np.int64)
        np.cumsum(lengths, out=bounds[1:])
        offsets = self._read("<i8", self._index.offsets_at, self.num_sequences)
        at_end = offsets == bounds[:-1] * self.dtype.itemsize
        self._check_entries(at_end, "byte offsets", offsets, "is not the end of the sequences before it")
        if bounds[-1] != self.num_tokens:
            what = f"its sequences have {bounds[-1]} tokens; {self.path('bin').name} has {self.num_tokens}"
            raise self._error("idx", f"{what}: one of the two files is truncated, or of another pair")
        entries = self._sequences_of_documents()
        rising = np.diff(entries, prepend=0) >= 0
        self._check_entries(rising, "document indices", entries, "is less than the one before it")
        if entries[0] or entries[-1] != self.num_sequences:
            what = f"field document indices goes from {entries[0]} to {entries[-1]}"
            raise self._error("idx", f"{what}; to contain all {self.num_sequences} sequences, it must end with them")
        bounds = bounds[entries]
        longest = int(np.diff(bounds).max(initial=0))
        if longest > MAX_DOCUMENT_TOKENS:
            what = f"document {int(np.argmax(np.diff(bounds)))} has {longest} tokens in its sequences"
            raise self._error("idx", f"{what}; a document has at most {MAX_DOCUMENT_TOKENS}", "Split the document")
        return bounds

    def _sequences_of_documents(self) -> IntArray:
        """Return the first sequence of each document, and the end of the last."""
        entries = self._read("<i8", self._index.documents_at, self._num_entries)
        return np.arange(self.num_sequences + 1) if entries.tolist() in ([], [0]) else entries

    def _parse(self, head: bytes, file_bytes: int) -> tuple[np.dtype[Any], int, int]:
        """Return type, number of sequences and number of document entries of the header; check the file's length."""
        if head.startswith(OLD_MAGIC):
            what = f"this index is of the older format {OLD_MAGIC[:6].decode()} (--dataset-impl lazy or cached)"
            raise self._error("idx", what, "Make the pair again with --dataset-impl mmap")
        if not head.startswith(IDX_MAGIC):
            what = f"the file begins with {head[: len(IDX_MAGIC)]!r}, not {IDX_MAGIC!r}: it is not an index of Megatron"
            raise self._error("idx", what, "Name pairs made by Megatron-LM or GPT-NeoX")
        if len(head) < IDX_HEADER.size:
            what = f"the file ends at byte {len(head)}, inside its header of {IDX_HEADER.size} bytes"
            raise self._error("idx", what)
        _, version, code, sequences, entries = IDX_HEADER.unpack(head)
        if version != IDX_VERSION:
            what = f"the index has version {version}; version {IDX_VERSION} can be read"
            raise self._error("idx", what, f"Make the pair again in version {IDX_VERSION}")
        if code not in DTYPES:
            kind = "floating-point numbers" if code in FLOAT_CODES else "of an unknown type"
            known = ", ".join(f"{number} ({dtype.name})" for number, dtype in DTYPES.items())
            what = f"the numbers are {kind} (dtype code {code}); those of token ids are {known}"
            raise self._error("idx", what, "Make the pair again with an integer type")
        self._check_length(sequences, entries, file_bytes)
        return DTYPES[code], sequences, entries

    def _check_length(self, sequences: int, entries: int, file_bytes: int) -> None:
        """Raise DataError if the length of the index differs from that of its arrays."""
        expected = IdxHeader(np.dtype("<u2"), sequences).documents_at + 8 * entries
        if file_bytes == expected:
            return
        if sequences and file_bytes == expected + sequences:
            what = f"the index ends with a mode for each of its {sequences} sequences: the dataset is multimodal"
            raise self._error("idx", what, "Use a dataset of text")
        if file_bytes == IDX_HEADER.size - 8 + 12 * sequences:
            what = f"the index of {sequences} sequences lists no documents, as that of fairseq"
            raise self._error("idx", what, "Make the pair again with Megatron-LM or GPT-NeoX")
        what = f"the file has {file_bytes} bytes; {sequences} sequences and {entries} document entries need {expected}"
        raise self._error("idx", what)

    def _check_entries(self, good: BoolArray, field: str, values: IntArray, what: str) -> None:
        if not good.all():
            wrong = int(np.argmin(good))
            raise self._error("idx", f"field {field}, entry {wrong}, {values[wrong]}, {what}")

    def _read(self, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
        try:
            found = np.fromfile(self.path("idx"), dtype, count, offset=offset)
        except OSError as error:
            raise unreadable_error(self.path("idx"), error) from error
        if found.size != count:
            raise self._error("idx", f"the file ends after byte {offset}; it was longer when it was opened")
        return found

    def _error(self, suffix: Suffix, what: str, remedy: str = COPY_AGAIN) -> DataError:
        return DataError(what, remedy=remedy, location=self.path(suffix))


def find_pairs(source: Path) -> list[MegatronPair]:
    """Open the pairs of a folder, in the order of their names, or the one pair that a path names.

    Args:
        source: folder, or path of a pair without suffix, of its .bin or of its .idx file.

    Raises:
        DataError: there is no pair, half of a pair is missing, or a pair cannot be opened.
    """
    if source.is_dir():
        found = [path for path in source.iterdir() if not path.name.startswith(".")]
        files = [path for path in found if path.suffix in _ENDINGS]
        if others := sorted(path.name for path in found if path not in files):
            listed = ", ".join(others[:MAX_NAMES_IN_MESSAGE]) + ", ..." * (len(others) > MAX_NAMES_IN_MESSAGE)
            _log.info("%s: %d files and folders are skipped: %s", source, len(others), listed)
    else:
        prefix = source.with_suffix("") if source.suffix in _ENDINGS else source
        files = [file for ending in _ENDINGS if (file := prefix.with_name(prefix.name + ending)).exists()]
    if not files:
        raise _no_pairs_error(source)
    for file in files:
        missing = file.with_suffix(".idx" if file.suffix == ".bin" else ".bin")
        if not missing.exists():
            what = f"there is no {missing.name}: a dataset of Megatron is a pair of .bin and .idx"
            raise DataError(what, remedy="Copy both files, or name another pair without suffix", location=file)
    return [MegatronPair(prefix) for prefix in sorted({file.with_suffix("") for file in files})]


def _no_pairs_error(source: Path) -> DataError:
    if not source.is_dir():
        what = "there is no such folder or pair of .bin and .idx"
    else:
        inside = sorted({path.parent.name for path in source.glob("*/*.idx")})
        listed = f"; folders in it have some: {', '.join(inside[:MAX_NAMES_IN_MESSAGE])}" if inside else ""
        what = f"the folder has no files named *.bin and *.idx{listed}"
    return DataError(what, remedy="Name a pair without suffix, or a folder of pairs", location=source)
