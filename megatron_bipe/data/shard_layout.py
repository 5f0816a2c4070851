"""The byte layout of a shard's files: the only place that knows it. Described in docs/format.md.

NAME.bin  tokens, back to back, little-endian
NAME.idx  Megatron's index, version 1: header, i32 lengths, i64 byte offsets, i64 document indices
NAME.seg  header, then one bit a token, little bit order: does it close a segment
"""

import struct
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_bipe.errors import DataError
from megatron_bipe.types import IntArray

Suffix = Literal["bin", "idx", "seg"]
SUFFIXES: tuple[Suffix, ...] = ("bin", "idx", "seg")
FORMAT_VERSION = 1  # of a dataset folder: of its manifest and its .seg files

IDX_MAGIC = b"MMIDIDX\0\0"
IDX_VERSION = 1
IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document entries
SEG_MAGIC = b"BIPESEG\0"
SEG_HEADER = struct.Struct("<8sQQ")  # magic, version, tokens

DTYPE_CODES: dict[np.dtype[Any], int] = {
    np.dtype("<u2"): 8,
    np.dtype("<i4"): 4,
}  # of Megatron's eight codes, those that tokens have
UINT16_VOCAB_LIMIT = 65500  # Megatron's bound, so that its tools choose the same type
MAX_DOCUMENT_TOKENS = int(np.iinfo(np.int32).max)  # lengths are i32


def choose_dtype(vocab_size: int) -> np.dtype[Any]:
    """Storage type of the tokens of a vocabulary."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCAB_LIMIT else np.dtype("<i4")


def shard_path(folder: Path, name: str, suffix: Suffix) -> Path:
    """Where one file of a shard lies."""
    return folder / f"{name}.{suffix}"


def damaged(path: Path, what: str) -> DataError:
    """The one error for bytes that are not what they should be."""
    return DataError(what, remedy="Copy the shard's three files again, or make the dataset again", location=path)


class IdxHeader(NamedTuple):
    """Head of an index: what follows from it."""

    dtype: np.dtype[Any]
    documents: int

    @property
    def lengths_at(self) -> int:
        """Byte where the i32 sequence lengths start."""
        return IDX_HEADER.size

    @property
    def offsets_at(self) -> int:
        """Byte where the i64 byte offsets start."""
        return self.lengths_at + 4 * self.documents

    @property
    def documents_at(self) -> int:
        """Byte where the i64 document indices start; one more than there are documents."""
        return self.offsets_at + 8 * self.documents

    @property
    def file_bytes(self) -> int:
        """Length of the whole index."""
        return self.documents_at + 8 * (self.documents + 1)


def pack_idx(lengths: IntArray, dtype: np.dtype[Any]) -> bytes:
    """A whole index file for documents of these lengths, one sequence each."""
    offsets = np.zeros(lengths.size + 1, dtype="<i8")
    np.cumsum(lengths, out=offsets[1:])
    offsets *= dtype.itemsize
    entries = np.arange(lengths.size + 1, dtype="<i8")
    header = IDX_HEADER.pack(IDX_MAGIC, IDX_VERSION, DTYPE_CODES[dtype], lengths.size, entries.size)
    return b"".join([header, lengths.astype("<i4").tobytes(), offsets[:-1].tobytes(), entries.tobytes()])


def parse_idx_header(head: bytes, file_bytes: int, path: Path) -> IdxHeader:
    """Check the first bytes of an index against each other and the file's length.

    Raises:
        DataError: names the field, its byte and what it should be.
    """
    if len(head) < IDX_HEADER.size:
        raise damaged(path, f"the file ends at byte {len(head)}, inside its header of {IDX_HEADER.size} bytes")
    magic, version, code, sequences, entries = IDX_HEADER.unpack(head)
    dtypes = {number: dtype for dtype, number in DTYPE_CODES.items()}
    if magic != IDX_MAGIC:
        raise damaged(path, f"field magic (byte 0) is {magic!r}, not {IDX_MAGIC!r}: this is no Megatron index")
    if version != IDX_VERSION:
        raise damaged(path, f"field version (byte 9) is {version}; Megatron's index has version {IDX_VERSION}")
    if code not in dtypes:
        known = " and ".join(f"{number} ({dtype.name})" for number, dtype in dtypes.items())
        raise damaged(path, f"field dtype code (byte 17) is {code}; tokens have {known}")
    if entries != sequences + 1:
        what = f"field document entries (byte 26) is {entries}; {sequences} sequences (byte 18), one a document, make"
        raise damaged(path, f"{what} {sequences + 1}")
    header = IdxHeader(dtypes[code], sequences)
    if file_bytes != header.file_bytes:
        what = f"the file ends at byte {file_bytes}; field sequences (byte 18), {sequences}, makes"
        raise damaged(path, f"{what} {header.file_bytes} bytes")
    return header


def pack_seg(num_tokens: int, packed_ends: bytes) -> bytes:
    """A whole segment file."""
    return SEG_HEADER.pack(SEG_MAGIC, FORMAT_VERSION, num_tokens) + packed_ends


def parse_seg_header(head: bytes, file_bytes: int, path: Path) -> int:
    """Number of tokens, from the first bytes of a segment file checked against the file's length.

    Raises:
        DataError: names the field, its byte and what it should be.
    """
    if len(head) < SEG_HEADER.size:
        raise damaged(path, f"the file ends at byte {len(head)}, inside its header of {SEG_HEADER.size} bytes")
    magic, version, tokens = SEG_HEADER.unpack(head)
    if magic != SEG_MAGIC:
        raise damaged(path, f"field magic (byte 0) is {magic!r}, not {SEG_MAGIC!r}: this is no segment file")
    if version > FORMAT_VERSION:
        what = f"field version (byte 8) is {version}; this version of megatron_bipe reads up to {FORMAT_VERSION}"
        remedy = "Update megatron_bipe, or make the dataset again with this version"
        raise DataError(what, remedy=remedy, location=path)
    if version != FORMAT_VERSION:
        raise damaged(path, f"field version (byte 8) is {version}; there is no such version")
    expected = SEG_HEADER.size + packed_bytes(tokens)
    if file_bytes != expected:
        raise damaged(path, f"the file ends at byte {file_bytes}; field tokens (byte 16), {tokens}, makes {expected}")
    return int(tokens)


def packed_bytes(num_tokens: int) -> int:
    """Bytes that one bit a token takes."""
    return -(-num_tokens // 8)
