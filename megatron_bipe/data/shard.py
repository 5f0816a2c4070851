"""A shard's writer and reader; the bytes themselves are in `shard_layout.py`."""

import hashlib
import os
from array import array
from functools import cached_property
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

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
    damaged,
    pack_idx,
    pack_seg,
    packed_bytes,
    parse_idx_header,
    parse_seg_header,
    shard_path,
)
from megatron_bipe.errors import DataError
from megatron_bipe.io import partial_path, sync, unreadable
from megatron_bipe.types import BoolArray, IntArray, TokenArray, TokenizedDocument

__all__ = ["FORMAT_VERSION", "Shard", "ShardWriter", "choose_dtype"]


class ShardWriter:
    """Writes one shard under temporary names; `finish` makes it appear, leaving without it removes them.

    To be used in a `with` statement. Memory: one bit a token and four bytes a document; tokens go
    straight to disk.

    Args:
        folder: created if need be.
        name: of the shard, without a suffix; existing files of that name are replaced by `finish`.
        dtype: from `choose_dtype`.
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
        self._packed = bytearray()  # whole bytes of segment-end bits
        self._loose: BoolArray = np.zeros(0, dtype=np.bool_)  # bits since the last whole byte
        self._bin_sha256 = hashlib.sha256()
        self._bin = self._partial("bin").open("wb")

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add(self, document: TokenizedDocument) -> None:
        """Append a document, which may be empty.

        Raises:
            DataError: as `append`.
        """
        lengths_D = np.array([document.tokens_T.size], dtype=np.int64)
        self.append(document.tokens_T, document.ends_T, lengths_D, document.text_bytes)

    def append(self, tokens_T: TokenArray, ends_T: BoolArray, lengths_D: IntArray, text_bytes: int) -> None:
        """Append documents that lie end to end.

        Args:
            tokens_T: their tokens.
            ends_T: True where a token closes a segment.
            lengths_D: tokens of each document.
            text_bytes: UTF-8 length of their raw text together.

        Raises:
            DataError: a token does not fit the storage type, or a document has more tokens than an index entry counts.
        """
        if tokens_T.ndim != 1 or ends_T.shape != tokens_T.shape or ends_T.dtype != np.bool_:
            raise ValueError(f"no documents: tokens {tokens_T.shape}, ends {ends_T.shape} of {ends_T.dtype}")
        if int(lengths_D.sum()) != tokens_T.size:
            raise ValueError(f"documents of {lengths_D.sum()} tokens together, and {tokens_T.size} tokens")
        longest = int(lengths_D.max(initial=0))
        if longest > MAX_DOCUMENT_TOKENS:
            what = f"document {self.num_documents + int(np.argmax(lengths_D))} has {longest} tokens"
            what = f"{what}; an index entry counts to {MAX_DOCUMENT_TOKENS}"
            raise DataError(what, remedy="Split the document", location=self._path("idx"))
        data = np.ascontiguousarray(self._storable(tokens_T)).data
        self._bin.write(data)
        self._bin_sha256.update(data)
        bits = np.concatenate([self._loose, ends_T])
        full = bits.size - bits.size % 8
        self._packed += np.packbits(bits[:full], bitorder="little").tobytes()
        self._loose = bits[full:].copy()  # a view would keep all of `bits` alive
        self._lengths.frombytes(lengths_D.astype(np.int32).tobytes())
        self._text_bytes += text_bytes
        self.num_tokens += tokens_T.size
        self.num_segments += int(np.count_nonzero(ends_T))

    def finish(self) -> ShardRecord:
        """Write index and bits, force all to disk, then rename; the record is for the manifest."""
        last = np.packbits(self._loose, bitorder="little").tobytes()  # fills up with zero bits
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
        sync(self._folder)
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
            self._bin.close()  # which writes what is buffered, and fails on a full disk
        finally:
            for suffix in SUFFIXES:  # after `finish` there are none
                self._partial(suffix).unlink(missing_ok=True)

    def _path(self, suffix: Suffix) -> Path:
        return shard_path(self._folder, self.name, suffix)

    def _partial(self, suffix: Suffix) -> Path:
        return partial_path(self._path(suffix))

    def _storable(self, tokens_T: TokenArray) -> TokenArray:
        """Tokens in the storage type, refusing ids that it cannot hold."""
        bounds = np.iinfo(self._dtype)
        if tokens_T.dtype != self._dtype and tokens_T.size:
            low, high = int(tokens_T.min()), int(tokens_T.max())
            if low < bounds.min or high > bounds.max:
                raise DataError(
                    f"document {self.num_documents} has token ids from {low} to {high}; {self._dtype.name} cannot "
                    "hold them",
                    remedy="State the tokenizer's number of ids rightly: it decides the type",
                    location=self._path("bin"),
                )
        return tokens_T.astype(self._dtype, copy=False)


class Shard:
    """Reads one shard. Opening reads two headers; files stay open from their first use on, the index is kept then.

    Args:
        folder: of the dataset.
        record: from the manifest; or a bare name, to open three files without one.

    Raises:
        DataError: a file is missing, damaged, foreign, of a newer format, or not the one of the record.
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
            raise damaged(self.path("seg"), what)
        if self.record and self.num_documents != self.record.documents:
            what = f"field sequences (byte 18) is {self.num_documents}; the manifest says {self.record.documents}"
            raise damaged(self.path("idx"), what)
        expected = self.num_tokens * self.dtype.itemsize
        if sizes["bin"] != expected:
            what = f"the file ends at byte {sizes['bin']}; {self.num_tokens} tokens (field tokens of the .seg file) of"
            raise damaged(self.path("bin"), f"{what} {self.dtype.name} (dtype code of the .idx file) make {expected}")

    def __reduce__(self) -> tuple[type[Self], tuple[Path, ShardRecord | str]]:
        """Travel to another process as a path, not as open files."""
        return type(self), (self.folder, self.record or self.name)

    def is_open(self, suffix: Suffix) -> bool:
        """Whether a file has been read from."""
        return suffix in self._open

    def path(self, suffix: Suffix) -> Path:
        """One of the three files."""
        return shard_path(self.folder, self.name, suffix)

    def tokens(self, start: int, stop: int) -> TokenArray:
        """Tokens [start, stop) in the storage type."""
        self._check_range(start, stop)
        tokens = np.empty(stop - start, dtype=self.dtype)
        self.read_tokens(start, tokens)
        return tokens

    def ends(self, start: int, stop: int) -> BoolArray:
        """Segment ends of tokens [start, stop)."""
        self._check_range(start, stop)
        bits = np.unpackbits(self.packed_ends(start // 8, packed_bytes(stop)), bitorder="little")
        return bits[start % 8 : start % 8 + stop - start].view(np.bool_)

    def packed_ends(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes [start, stop) of the segment-end bits, eight a byte from the lowest bit."""
        packed = np.empty(stop - start, dtype=np.uint8)
        self.read_packed_ends(start, packed)
        return packed

    def read_tokens(self, start: int, into: TokenArray) -> None:
        """Fill an array of the storage type with the tokens from `start` on."""
        self._read_into("bin", start * self.dtype.itemsize, into)

    def read_packed_ends(self, start: int, into: npt.NDArray[np.uint8]) -> None:
        """Fill an array with the bytes of segment-end bits from byte `start` on."""
        self._read_into("seg", SEG_HEADER.size + start, into)

    @cached_property
    def document_bounds(self) -> IntArray:
        """First token of each document and the end of the last, int64 [num_documents + 1].

        Raises:
            DataError: the index contradicts itself or the number of tokens.
        """
        head, count = self._idx, self.num_documents
        lengths = self._read("<i4", head.lengths_at, count)
        self._check_entries(lengths >= 0, head.lengths_at, 4, "sequence lengths", "is negative")
        bounds = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(lengths, out=bounds[1:])
        at_length = self._read("<i8", head.offsets_at, count) == bounds[:-1] * self.dtype.itemsize
        self._check_entries(at_length, head.offsets_at, 8, "byte offsets", "is not the sum of the lengths before it")
        in_order = self._read("<i8", head.documents_at, count + 1) == np.arange(count + 1)
        self._check_entries(in_order, head.documents_at, 8, "document indices", "is not one sequence a document")
        if bounds[-1] != self.num_tokens:
            what = f"field sequence lengths (byte {head.lengths_at}) adds up to {bounds[-1]} tokens"
            raise damaged(self.path("idx"), f"{what}; the .seg file has {self.num_tokens}")
        bounds.flags.writeable = False
        return bounds

    def _check_entries(self, good: BoolArray, at: int, width: int, field: str, what: str) -> None:
        if not good.all():
            wrong = int(np.argmin(good))
            raise damaged(self.path("idx"), f"field {field}, entry {wrong} (byte {at + width * wrong}) {what}")

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a shard of {self.num_tokens}")

    def _size(self, suffix: Suffix) -> int:
        try:
            size = self.path(suffix).stat().st_size
        except OSError as error:
            raise unreadable(self.path(suffix), error) from error
        expected = self.record.files[suffix].bytes if self.record else size
        if size != expected:
            raise damaged(self.path(suffix), f"the file ends at byte {size}; the manifest says {expected} bytes")
        return size

    def _head(self, suffix: Suffix, num_bytes: int) -> bytes:
        try:
            with self.path(suffix).open("rb") as stream:
                return stream.read(num_bytes)
        except OSError as error:
            raise unreadable(self.path(suffix), error) from error

    def _read(self, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
        """Part of the index."""
        found = np.empty(count, dtype=dtype)
        self._read_into("idx", offset, found)
        return found

    def _read_into(self, suffix: Suffix, offset: int, into: npt.NDArray[Any]) -> None:
        """Fill a contiguous array from a file. Not mapped: a window's pages would bring their neighbours along."""
        try:
            stream = self._open.get(suffix)
            if stream is None:
                stream = self._open[suffix] = self.path(suffix).open("rb", buffering=0)
            # A system call reads 2 GiB at most.
            view = into.data.cast("B") if into.size else memoryview(b"")
            while view and (count := os.preadv(stream.fileno(), [view], offset)):
                view, offset = view[count:], offset + count
        except OSError as error:
            raise unreadable(self.path(suffix), error) from error
        if view:
            raise damaged(self.path(suffix), f"the file ends at byte {offset}; it was longer when it was opened")


def _sync(stream: BinaryIO, sha256: str) -> FileRecord:
    """Force an open file to the disk; the record of what is in it."""
    stream.flush()
    os.fsync(stream.fileno())
    return FileRecord(bytes=stream.tell(), sha256=sha256)
