"""Writer and reader of a shard; `shard_layout.py` defines the byte layout."""

import hashlib
import os
from array import array
from functools import cached_property
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import numpy as np
import numpy.typing as npt

from megatron_bipe.data.manifest import FileRecord, ShardRecord
from megatron_bipe.data.shard_layout import (
    DTYPE_CODES,
    FORMAT_VERSION,
    IDX_HEADER,
    MAX_DOCUMENT_TOKENS,
    SEG_HEADER,
    SUFFIXES,
    Suffix,
    choose_dtype,
    damaged_error,
    pack_idx,
    pack_seg,
    packed_bytes,
    parse_idx_header,
    parse_seg_header,
    shard_path,
)
from megatron_bipe.errors import DataError
from megatron_bipe.io import fsync_path, partial_path, unreadable_error
from megatron_bipe.types import BoolArray, IntArray, TokenArray, TokenizedDocument

__all__ = ["FORMAT_VERSION", "Shard", "ShardWriter", "TokenSource", "choose_dtype"]


class ShardWriter:
    """Writer of one shard, to be used in a `with` statement.

    Files have temporary names until `finish` renames them; leaving without `finish` removes them. Tokens go straight to
    disk. The writer holds one bit per token and four bytes per document in memory.

    Args:
        folder: created if it does not exist.
        name: name of the shard, without a suffix; `finish` replaces existing files of that name.
        dtype: storage dtype, from `choose_dtype`.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        if dtype not in DTYPE_CODES:
            raise ValueError(f"tokens are stored as uint16 or int32, not {dtype}")
        self.name = name
        self.num_tokens = 0
        self.num_segments = 0
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._dtype = np.dtype(dtype)
        self._lengths = array("i")
        self._text_bytes = 0
        self._packed = bytearray()  # complete bytes of segment-end bits
        self._partial_byte: BoolArray = np.zeros(0, dtype=np.bool_)  # bits after the last complete byte
        self._bin_sha256 = hashlib.sha256()
        self._bin = self._partial("bin").open("wb")

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def add(self, document: TokenizedDocument) -> None:
        """Append a document, which may be empty; errors as in `append`."""
        lengths_D = np.array([document.tokens_T.size], dtype=np.int64)
        self.append(document.tokens_T, document.ends_T, lengths_D, document.text_bytes)

    def append(self, tokens_T: TokenArray, ends_T: BoolArray, lengths_D: IntArray, text_bytes: int) -> None:
        """Append documents whose tokens are concatenated.

        Args:
            tokens_T: tokens of all the documents.
            ends_T: True where a token closes a segment.
            lengths_D: number of tokens of each document.
            text_bytes: UTF-8 length of all the raw text.

        Raises:
            DataError: a token does not fit the storage dtype, or a document is too long for an index entry.
        """
        if tokens_T.ndim != 1 or ends_T.shape != tokens_T.shape or ends_T.dtype != np.bool_:
            raise ValueError(f"invalid arrays: tokens {tokens_T.shape}, ends {ends_T.shape} of {ends_T.dtype}")
        if int(lengths_D.sum()) != tokens_T.size:
            raise ValueError(f"lengths_D adds up to {lengths_D.sum()}, but there are {tokens_T.size} tokens")
        longest = int(lengths_D.max(initial=0))
        if longest > MAX_DOCUMENT_TOKENS:
            what = f"document {self.num_documents + int(np.argmax(lengths_D))} has {longest} tokens"
            what = f"{what}; an index entry holds at most {MAX_DOCUMENT_TOKENS}"
            raise DataError(what, remedy="Split the document", location=self._path("idx"))
        data = np.ascontiguousarray(self._storable(tokens_T)).data
        self._bin.write(data)
        self._bin_sha256.update(data)
        bits = np.concatenate([self._partial_byte, ends_T])
        full = bits.size - bits.size % 8
        self._packed += np.packbits(bits[:full], bitorder="little").tobytes()
        self._partial_byte = bits[full:].copy()  # a view would keep all of `bits` alive
        self._lengths.frombytes(lengths_D.astype(np.int32).tobytes())
        self._text_bytes += text_bytes
        self.num_tokens += tokens_T.size
        self.num_segments += int(np.count_nonzero(ends_T))

    def finish(self) -> ShardRecord:
        """Write index and segment-end bits, fsync all files, rename them, and return the record for the manifest."""
        last = np.packbits(self._partial_byte, bitorder="little").tobytes()  # padded with zero bits
        contents: dict[Suffix, bytes] = {
            "idx": pack_idx(np.array(self._lengths, dtype=np.int64), self._dtype),
            "seg": pack_seg(self.num_tokens, bytes(self._packed) + last),
        }
        files: dict[Suffix, FileRecord] = {"bin": _sync(self._bin, self._bin_sha256.hexdigest())}
        self._bin.close()
        for suffix, data in contents.items():
            with self._partial(suffix).open("wb") as stream:
                stream.write(data)
                files[suffix] = _sync(stream, hashlib.sha256(data).hexdigest())
        for suffix in SUFFIXES:
            self._partial(suffix).replace(self._path(suffix))
        fsync_path(self._folder)
        return ShardRecord(
            name=self.name,
            documents=self.num_documents,
            tokens=self.num_tokens,
            segments=self.num_segments,
            text_bytes=self._text_bytes,
            files=files,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._bin.close()  # flushes the buffer, which fails on a full disk
        finally:
            for suffix in SUFFIXES:  # none are left after `finish`
                self._partial(suffix).unlink(missing_ok=True)

    def _path(self, suffix: Suffix) -> Path:
        return shard_path(self._folder, self.name, suffix)

    def _partial(self, suffix: Suffix) -> Path:
        return partial_path(self._path(suffix))

    def _storable(self, tokens_T: TokenArray) -> TokenArray:
        """Return tokens in the storage dtype; raise an error if it cannot hold them."""
        bounds = np.iinfo(self._dtype)
        if tokens_T.dtype != self._dtype and tokens_T.size:
            low, high = int(tokens_T.min()), int(tokens_T.max())
            if low < bounds.min or high > bounds.max:
                raise DataError(
                    f"document {self.num_documents} has token ids from {low} to {high}; {self._dtype.name} cannot "
                    "hold them",
                    remedy="Choose the storage dtype from the tokenizer's actual number of ids",
                    location=self._path("bin"),
                )
        return tokens_T.astype(self._dtype, copy=False)


class TokenSource(Protocol):
    """The part of a shard that a segment rule needs; other formats have it, too."""

    num_tokens: int
    dtype: np.dtype[Any]

    @property
    def document_bounds(self) -> IntArray: ...
    def path(self, suffix: Suffix) -> Path: ...
    def tokens(self, start: int, stop: int) -> TokenArray: ...


class Shard:
    """Reader of one shard.

    Opening reads two headers. After their first use, files stay open, and the index stays in memory.

    Args:
        folder: folder of the dataset.
        record: record from the manifest, or only the shard's name.

    Raises:
        DataError: a file is missing, damaged, of another kind or a newer format, or does not match the record.
    """

    def __init__(self, folder: Path, record: ShardRecord | str) -> None:
        self.folder = Path(folder)
        self.record = record if isinstance(record, ShardRecord) else None
        self.name = record.name if isinstance(record, ShardRecord) else record
        self._open: dict[Suffix, FileIO] = {}
        sizes = {suffix: self._size(suffix) for suffix in SUFFIXES}
        self.num_tokens = parse_seg_header(self._head("seg", SEG_HEADER.size), sizes["seg"], self.path("seg"))
        self._idx = parse_idx_header(self._head("idx", IDX_HEADER.size), sizes["idx"], self.path("idx"))
        self.dtype, self.num_documents = self._idx
        if self.record and self.num_tokens != self.record.tokens:
            what = f"field tokens (byte 16) is {self.num_tokens}; the manifest says {self.record.tokens}"
            raise damaged_error(self.path("seg"), what)
        if self.record and self.num_documents != self.record.documents:
            what = f"field sequences (byte 18) is {self.num_documents}; the manifest says {self.record.documents}"
            raise damaged_error(self.path("idx"), what)
        expected = self.num_tokens * self.dtype.itemsize
        if sizes["bin"] != expected:
            what = f"the file ends at byte {sizes['bin']}; {self.num_tokens} tokens (field tokens of the .seg file) of"
            raise damaged_error(
                self.path("bin"), f"{what} {self.dtype.name} (dtype code of the .idx file) need {expected}"
            )

    def __reduce__(self) -> tuple[type[Self], tuple[Path, ShardRecord | str]]:
        """Support pickling for other processes: they reopen the files."""
        return type(self), (self.folder, self.record or self.name)

    def is_open(self, suffix: Suffix) -> bool:
        """Return True if the file has been read from."""
        return suffix in self._open

    def path(self, suffix: Suffix) -> Path:
        return shard_path(self.folder, self.name, suffix)

    def tokens(self, start: int, stop: int) -> TokenArray:
        """Read tokens [start, stop) in the storage dtype."""
        self._check_range(start, stop)
        tokens = np.empty(stop - start, dtype=self.dtype)
        self.read_tokens(start, tokens)
        return tokens

    def ends(self, start: int, stop: int) -> BoolArray:
        """Read the segment ends of tokens [start, stop)."""
        self._check_range(start, stop)
        bits = np.unpackbits(self.packed_ends(start // 8, packed_bytes(stop)), bitorder="little")
        return bits[start % 8 : start % 8 + stop - start].view(np.bool_)

    def packed_ends(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Read bytes [start, stop) of the segment-end bits; the lowest bit of a byte comes first."""
        packed = np.empty(stop - start, dtype=np.uint8)
        self.read_packed_ends(start, packed)
        return packed

    def read_tokens(self, start: int, into: TokenArray) -> None:
        """Fill an array of the storage dtype with the tokens from `start` on."""
        self._read_into("bin", start * self.dtype.itemsize, into)

    def read_packed_ends(self, start: int, into: npt.NDArray[np.uint8]) -> None:
        """Fill an array with the segment-end bits from byte `start` on."""
        self._read_into("seg", SEG_HEADER.size + start, into)

    @cached_property
    def document_bounds(self) -> IntArray:
        """First token of each document and the end of the last, int64 [num_documents + 1]; validates the index."""
        head, count = self._idx, self.num_documents
        lengths = self._read("<i4", head.lengths_at, count)
        self._check_entries(lengths >= 0, head.lengths_at, 4, "sequence lengths", "is negative")
        bounds = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(lengths, out=bounds[1:])
        at_length = self._read("<i8", head.offsets_at, count) == bounds[:-1] * self.dtype.itemsize
        self._check_entries(at_length, head.offsets_at, 8, "byte offsets", "is not the sum of the lengths before it")
        in_order = self._read("<i8", head.documents_at, count + 1) == np.arange(count + 1)
        self._check_entries(in_order, head.documents_at, 8, "document indices", "does not give a document one sequence")
        if bounds[-1] != self.num_tokens:
            what = f"field sequence lengths (byte {head.lengths_at}) adds up to {bounds[-1]} tokens"
            raise damaged_error(self.path("idx"), f"{what}; the .seg file has {self.num_tokens}")
        bounds.flags.writeable = False
        return bounds

    def _check_entries(self, good: BoolArray, at: int, width: int, field: str, what: str) -> None:
        if not good.all():
            wrong = int(np.argmin(good))
            raise damaged_error(self.path("idx"), f"field {field}, entry {wrong} (byte {at + width * wrong}) {what}")

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a shard of {self.num_tokens}")

    def _size(self, suffix: Suffix) -> int:
        try:
            size = self.path(suffix).stat().st_size
        except OSError as error:
            raise unreadable_error(self.path(suffix), error) from error
        expected = self.record.files[suffix].bytes if self.record else size
        if size != expected:
            raise damaged_error(self.path(suffix), f"the file ends at byte {size}; the manifest says {expected} bytes")
        return size

    def _head(self, suffix: Suffix, num_bytes: int) -> bytes:
        try:
            with self.path(suffix).open("rb") as stream:
                return stream.read(num_bytes)
        except OSError as error:
            raise unreadable_error(self.path(suffix), error) from error

    def _read(self, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
        found = np.empty(count, dtype=dtype)
        self._read_into("idx", offset, found)
        return found

    def _read_into(self, suffix: Suffix, offset: int, into: npt.NDArray[Any]) -> None:
        """Fill a contiguous array from a file, which is not memory-mapped: that would also read neighboring pages."""
        try:
            stream = self._open.get(suffix)
            if stream is None:
                stream = self._open[suffix] = self.path(suffix).open("rb", buffering=0)
            # A system call reads at most 2 GiB.
            view = into.data.cast("B") if into.size else memoryview(b"")
            while view and (count := os.preadv(stream.fileno(), [view], offset)):
                view, offset = view[count:], offset + count
        except OSError as error:
            raise unreadable_error(self.path(suffix), error) from error
        if view:
            raise damaged_error(self.path(suffix), f"the file ends at byte {offset}; it was longer when it was opened")


def _sync(stream: BinaryIO, sha256: str) -> FileRecord:
    """Fsync an open file and return its record."""
    stream.flush()
    os.fsync(stream.fileno())
    return FileRecord(bytes=stream.tell(), sha256=sha256)
