"""The byte layout of a shard's files, which no other module knows. docs/format.md describes it.

NAME.bin  tokens, concatenated, little-endian
NAME.idx  Megatron's index, version 1: header, i32 lengths, i64 byte offsets, i64 document indices
NAME.seg  header, then one bit per token, lowest bit first: 1 if the token closes a segment
"""

import struct
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_bipe.errors import DataError
from megatron_bipe.types import IntArray

Suffix = Literal["bin", "idx", "seg"]
DtypeName = Literal["uint16", "int32"]
PAIR_SUFFIXES: tuple[Suffix, ...] = ("bin", "idx")  # the files in Megatron's format
SUFFIXES: tuple[Suffix, ...] = (*PAIR_SUFFIXES, "seg")
FORMAT_VERSION = 1  # version of the manifest and of .seg files

IDX_MAGIC = b"MMIDIDX\0\0"
IDX_VERSION = 1
IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document entries
SEG_MAGIC = b"BIPESEG\0"
SEG_HEADER = struct.Struct("<8sQQ")  # magic, version, tokens

DTYPE_CODES: dict[np.dtype[Any], int] = {
    np.dtype("<u2"): 8,
    np.dtype("<i4"): 4,
}  # those of Megatron's eight codes that are used for tokens
UINT16_VOCAB_LIMIT = 65500  # Megatron's limit, so that its tools choose the same dtype
MAX_DOCUMENT_TOKENS = int(np.iinfo(np.int32).max)  # lengths are i32


def choose_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the storage dtype for the tokens of a vocabulary."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCAB_LIMIT else np.dtype("<i4")


def dtype_name(dtype: np.dtype[Any]) -> DtypeName:
    """Return the name of a storage dtype, as manifests have it."""
    return "uint16" if dtype.itemsize == 2 else "int32"


def shard_name(number: int) -> str:
    """Return the name of a dataset's shard, counted from 0."""
    return f"tokens-{number:05d}"


def shard_path(folder: Path, name: str, suffix: Suffix) -> Path:
    return folder / f"{name}.{suffix}"


def damaged_error(path: Path, what: str) -> DataError:
    """Return the error for a file of a shard that is damaged."""
    return DataError(what, remedy="Copy the shard's three files again, or make the dataset again", location=path)


class IdxHeader(NamedTuple):
    """Header of an index, and the byte positions that follow from it."""

    dtype: np.dtype[Any]
    documents: int

    @property
    def lengths_at(self) -> int:
        return IDX_HEADER.size

    @property
    def offsets_at(self) -> int:
        return self.lengths_at + 4 * self.documents

    @property
    def documents_at(self) -> int:
        """Byte where the i64 document indices start; they have one entry more than there are documents."""
        return self.offsets_at + 8 * self.documents

    @property
    def file_bytes(self) -> int:
        return self.documents_at + 8 * (self.documents + 1)


def pack_idx(lengths: IntArray, dtype: np.dtype[Any]) -> bytes:
    """Return a complete index file for documents of these lengths, one sequence each."""
    offsets = np.zeros(lengths.size + 1, dtype="<i8")
    np.cumsum(lengths, out=offsets[1:])
    offsets *= dtype.itemsize
    entries = np.arange(lengths.size + 1, dtype="<i8")
    header = IDX_HEADER.pack(IDX_MAGIC, IDX_VERSION, DTYPE_CODES[dtype], lengths.size, entries.size)
    return b"".join([header, lengths.astype("<i4").tobytes(), offsets[:-1].tobytes(), entries.tobytes()])


def parse_idx_header(head: bytes, file_bytes: int, path: Path) -> IdxHeader:
    """Return the header of an index; raise DataError, naming field and byte, if it or the file's length is wrong."""
    if len(head) < IDX_HEADER.size:
        raise damaged_error(path, f"the file ends at byte {len(head)}, inside its header of {IDX_HEADER.size} bytes")
    magic, version, code, sequences, entries = IDX_HEADER.unpack(head)
    dtypes = {number: dtype for dtype, number in DTYPE_CODES.items()}
    if magic != IDX_MAGIC:
        raise damaged_error(path, f"field magic (byte 0) is {magic!r}, not {IDX_MAGIC!r}: this is not a Megatron index")
    if version != IDX_VERSION:
        raise damaged_error(path, f"field version (byte 9) is {version}; Megatron's index has version {IDX_VERSION}")
    if code not in dtypes:
        known = " and ".join(f"{number} ({dtype.name})" for number, dtype in dtypes.items())
        raise damaged_error(path, f"field dtype code (byte 17) is {code}; codes of tokens are {known}")
    if entries != sequences + 1:
        what = f"field document entries (byte 26) is {entries}; {sequences} sequences (byte 18), one a document, need"
        raise damaged_error(path, f"{what} {sequences + 1}")
    header = IdxHeader(dtypes[code], sequences)
    if file_bytes != header.file_bytes:
        what = f"the file ends at byte {file_bytes}; field sequences (byte 18), {sequences}, requires"
        raise damaged_error(path, f"{what} {header.file_bytes} bytes")
    return header


def pack_seg(num_tokens: int, packed_ends: bytes) -> bytes:
    """Return a segment file: the header and these bits. The caller may append more bits."""
    return SEG_HEADER.pack(SEG_MAGIC, FORMAT_VERSION, num_tokens) + packed_ends


def parse_seg_header(head: bytes, file_bytes: int, path: Path) -> int:
    """Return the number of tokens from the header of a segment file; raise DataError as `parse_idx_header` does."""
    if len(head) < SEG_HEADER.size:
        raise damaged_error(path, f"the file ends at byte {len(head)}, inside its header of {SEG_HEADER.size} bytes")
    magic, version, tokens = SEG_HEADER.unpack(head)
    if magic != SEG_MAGIC:
        raise damaged_error(path, f"field magic (byte 0) is {magic!r}, not {SEG_MAGIC!r}: this is not a segment file")
    if version > FORMAT_VERSION:
        what = f"field version (byte 8) is {version}; this version of megatron_bipe reads up to {FORMAT_VERSION}"
        remedy = "Update megatron_bipe, or make the dataset again with this version"
        raise DataError(what, remedy=remedy, location=path)
    if version != FORMAT_VERSION:
        raise damaged_error(path, f"field version (byte 8) is {version}; that version does not exist")
    expected = SEG_HEADER.size + packed_bytes(tokens)
    if file_bytes != expected:
        raise damaged_error(
            path, f"the file ends at byte {file_bytes}; field tokens (byte 16), {tokens}, needs {expected}"
        )
    return int(tokens)


def packed_bytes(num_tokens: int) -> int:
    """Return the number of bytes that hold one bit per token."""
    return -(-num_tokens // 8)
