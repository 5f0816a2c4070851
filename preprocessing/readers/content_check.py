"""Recognize files whose content is not what their name says, by their first bytes."""

import codecs
import json
import re
from pathlib import Path
from typing import NamedTuple

import orjson

from megatron_bipe.data.hub import LFS_REMEDY, LFS_START
from megatron_bipe.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8
HEAD_BYTES = 512
LEAST_UTF_16_BYTES = 16  # fewer show nothing
UTF_16_SHARE = 0.7  # of the pairs of bytes; Latin text has a NUL in all of them
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
PIECES_OF_JSON = (b"{", b"[", b",", b":")  # a line that ends so cannot be complete JSON


class _Format(NamedTuple):
    """File format that is recognized by its first bytes."""

    start: re.Pattern[bytes]
    name: str
    suffixes: tuple[str, ...]  # of the names that such a file may have
    remedy: str


def _format(start: bytes, name: str, suffixes: tuple[str, ...] = (), remedy: str = "") -> _Format:
    return _Format(re.compile(start, re.DOTALL), name, suffixes, remedy or f"Rename it to end with {suffixes[0]}")


NOT_UTF_8 = "This text has the NUL bytes of UTF-16 or UTF-32, but it must be UTF-8"
_OR_SKIP = "if it is not data, name the other files by a pattern"
_FROM_UTF_16 = "Convert it: iconv -f UTF-16LE -t UTF-8 FILE > NEW, or with UTF-16BE"
_FETCH = "Fetch the file again, and check the address and the access rights"
FORMATS = (
    _format(rb"\x1f\x8b", "data compressed with gzip", (".gz",)),
    _format(rb"\x28\xb5\x2f\xfd", "data compressed with zstd", (".zst",)),
    _format(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)", "data compressed with bzip2", (".bz2",)),
    _format(rb"\xfd7zXZ\x00", "data compressed with xz", (".xz",)),
    _format(rb"PK[\x03\x05]", "a zip archive", (), "Unpack it, and name the files in it"),
    _format(rb"PAR1[\x00-\x1f]", "a parquet file", (".parquet",)),
    _format(rb"ARROW1\x00\x00", "an Arrow file", (".arrow",)),
    _format(rb"\xff\xfe|\xfe\xff", "text in UTF-16 or UTF-32", (), "Convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    _format(re.escape(LFS_START), "a pointer of Git LFS to a file that was not fetched", (), LFS_REMEDY),
    _format(rb"\s*<(?i:!doctype html|html)[\s>]", "a page of HTML", (".txt",), _FETCH),
    _format(rb"\s*<\?xml\s", "an XML document", (".txt",), _FETCH),
    _format(rb"[^\0].{256}ustar[\0 ]", "a tar archive", (), "Unpack it, and name the files in it"),
)


def require_named_format(file: Path) -> None:
    """Raise `DataError` if a file's first bytes show another format than its name says, or it has none to unpack."""
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    name = file.name.lower()
    for known in FORMATS:
        if known.start.match(head) and not name.endswith(known.suffixes or "/"):
            raise DataError(f"This is {known.name}, not what its name says", remedy=known.remedy, location=file)
    compressed = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), None)
    if compressed and not head:
        raise DataError(
            f"The file is empty, but even compressed data without content is not ({compressed})",
            remedy="Fetch or make the file again",
            location=file,
        )
    if compressed and _is_text(head):
        raise DataError(
            "This is plain text, not what its name says", remedy=f"Rename it without {compressed}", location=file
        )


def require_json_lines(start: bytes, file: Path) -> None:
    """Raise `DataError` if the start of a file's content shows that it does not hold a JSON object in each line."""
    if file.name.lower().endswith(COMPRESSIONS):
        _require_unpacked(start, file)
    text = start.removeprefix(BYTE_ORDER_MARK).lstrip()
    first, newline, _ = text.partition(b"\n")
    first = first.rstrip()
    if b"\0" in text[:4]:
        raise DataError(NOT_UTF_8, remedy=_FROM_UTF_16, location=file)
    if text.startswith(b"["):
        raise DataError(
            "This is one JSON array, but a file must have one JSON object in each line",
            remedy=f"Convert it: jq -c '.[]' FILE > NEW.jsonl; {_OR_SKIP}",
            location=file,
        )
    if newline and first.startswith(b"{") and first.endswith(PIECES_OF_JSON) and not _is_json(first.rstrip(b",")):
        raise DataError(
            f"A JSON object is spread over several lines: the first is {first[:40].decode(errors='replace')!r}; a file "
            "must have one object in each line",
            remedy=f"Convert it: jq -c . FILE > NEW.jsonl; {_OR_SKIP}",
            location=file,
        )
    if _has_several_objects(first):
        raise DataError(
            f"The first line has several JSON objects: {first[:40].decode(errors='replace')!r}...; a file must have "
            "one object in each line, and lines end with \\n",
            remedy=f"Convert it: jq -c . FILE > NEW.jsonl; {_OR_SKIP}",
            location=file,
        )


def _require_unpacked(content: bytes, file: Path) -> None:
    """Raise `DataError` if the content of a compressed file is compressed again, an archive, or no data."""
    for known in FORMATS:
        if known.start.match(content):
            remedy = "Decompress it once" if set(known.suffixes) & set(COMPRESSIONS) else known.remedy
            raise DataError(f"The decompressed content is {known.name}", remedy=remedy, location=file)


def _has_several_objects(line: bytes) -> bool:
    """Return True if another JSON object follows the first one in a line, or in the known start of it."""
    if not line.startswith(b"{") or _is_json(line):
        return False
    text = line.decode(errors="ignore")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text[end:].lstrip().startswith("{")


def require_text(content: bytes | bytearray, file: Path) -> None:
    """Raise `DataError` if most pairs of bytes have a NUL: UTF-16 without a mark, which is also valid UTF-8."""
    head = bytes(content[:HEAD_BYTES])
    if len(head) >= LEAST_UTF_16_BYTES and max(head[::2].count(0), head[1::2].count(0)) > UTF_16_SHARE * len(head) / 2:
        raise DataError(NOT_UTF_8, remedy=_FROM_UTF_16, location=file)


def _is_text(head: bytes) -> bool:
    """Return True for the beginning of a text in UTF-8 without control characters."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return re.fullmatch(rb"[\t-\r\x20-\x7e\x80-\xff]+", head) is not None


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True
