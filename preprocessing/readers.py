"""Raw text files -> blocks of bytes -> documents: `.jsonl`, `.jsonl.zst`, `.jsonl.gz` and `.txt`.

A block is the unit of work handed to a worker: whole lines of one file, or one whole text file. Reading cuts no
character and decodes nothing, so the parent stays cheap; `documents` parses a block, in the worker.
"""

import glob
import gzip
import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import zstandard

from megatron_bipe.errors import DataError
from megatron_bipe.types import Document

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".txt")
BLOCK_BYTES = 1 << 21  # of text: keeps every worker busy to near the end, and hides the cost of handing over
READ_BYTES = 1 << 17
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

log = logging.getLogger(__name__)


class Block(NamedTuple):
    """Part of one file: whole JSON lines, or all of a text file."""

    file: str
    first_line: int  # 1-based line in the file where `content` starts
    content: bytes
    is_json: bool  # lines of JSON objects; else the text of one document
    read_bytes: int  # of the file as it lies on disk, since the block before: for the time left


class Malformed(NamedTuple):
    """A line that is no document, and why."""

    file: str
    line: int
    reason: str


class Parsed(NamedTuple):
    """What a block holds: usable documents in order, malformed lines in order, and how many texts were empty."""

    documents: list[Document]
    malformed: list[Malformed]
    num_lines: int
    num_empty: int


def find_inputs(inputs: Sequence[str]) -> list[Path]:
    """Files named by paths, folders (searched through) and glob patterns, in the order given, each once.

    Raises:
        DataError: an input that names nothing, or a file of a kind that is not read.
    """
    found: dict[Path, None] = {}
    for entry in inputs:
        for file in _files_of(entry):
            if file in found:
                log.warning("%s is named twice among the inputs; it is read once", file)
            found[file] = None
    return list(found)


def _files_of(entry: str) -> list[Path]:
    path = Path(entry)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
    elif path.exists():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(entry, recursive=True) if Path(name).is_file())  # noqa: PTH207
    wrong = next((file for file in files if not file.name.endswith(SUFFIXES)), None)
    if wrong is not None:
        raise DataError(
            f"Files of this kind are not read; the kinds are {', '.join(SUFFIXES)}",
            remedy="Convert or rename the file",
            place=wrong,
        )
    if not files:
        raise DataError(
            f"The input names no file of the kinds {', '.join(SUFFIXES)}", remedy="Check the path", place=entry
        )
    return files


def read_blocks(file: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Blocks of about `block_bytes`, or of one line where a line is longer.

    Raises:
        DataError: the file cannot be opened, or its compressed data is damaged or cut short.
    """
    try:
        with file.open("rb") as raw:
            if file.name.endswith(".txt"):
                content = raw.read()
                yield Block(str(file), 1, content.removeprefix(BYTE_ORDER_MARK), False, raw.tell())
            else:
                yield from _line_blocks(file, raw, block_bytes)
    except (zstandard.ZstdError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise DataError(
            f"The compressed data is damaged or cut short: {error}", remedy="Fetch or make the file again", place=file
        ) from error
    except OSError as error:
        raise DataError(f"The file cannot be read: {error.strerror or error}", place=file) from error


def _line_blocks(file: Path, raw: BinaryIO, block_bytes: int) -> Iterator[Block]:
    next_line = 1
    told_bytes = 0
    pending = bytearray()
    for chunk in _chunks(file, raw):
        is_first = next_line == 1 and not pending
        searched = len(pending)  # beyond `block_bytes`, no newline lies before this place
        pending += chunk.removeprefix(BYTE_ORDER_MARK) if is_first else chunk
        while len(pending) >= block_bytes:
            end = pending.rfind(b"\n", 0, block_bytes) + 1 or pending.find(b"\n", max(searched, block_bytes)) + 1
            if end == 0:
                break
            content = bytes(pending[:end])
            del pending[:end]
            searched = 0
            yield Block(str(file), next_line, content, True, raw.tell() - told_bytes)
            told_bytes = raw.tell()
            next_line += content.count(b"\n")
    if pending:
        yield Block(str(file), next_line, bytes(pending), True, raw.tell() - told_bytes)


def _chunks(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    if file.name.endswith(".zst"):
        yield from _zstd_chunks(raw)
        return
    stream: Any = gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw
    while chunk := stream.read(READ_BYTES):
        yield chunk


def _zstd_chunks(raw: BinaryIO) -> Iterator[bytes]:
    """Content of all frames; `zstandard.stream_reader` would end quietly in the middle of a frame cut short."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    frame_began = False
    while chunk := raw.read(READ_BYTES):
        while chunk:
            frame_began = True
            yield frame.decompress(chunk)
            chunk = b""
            if frame.eof:
                chunk, frame, frame_began = frame.unused_data, decompressor.decompressobj(), False
    if frame_began:
        raise EOFError("the last zstd frame is incomplete")


def parse_block(block: Block, text_key: str, partition_key: str | None) -> Parsed:
    """Documents of a block, and the lines that hold none.

    Args:
        block: whole lines, or one text file.
        text_key: key (or dotted path) of the text in a JSON line.
        partition_key: key (or dotted path) of the value by which the data is split; None to keep it whole.
    """
    if not block.is_json:
        return _parse_text_file(block, partition_key)
    documents: list[Document] = []
    malformed: list[Malformed] = []
    num_lines = num_empty = 0
    for number, line in enumerate(block.content.split(b"\n"), start=block.first_line):
        if not line or line.isspace():
            continue
        num_lines += 1
        found = _parse_line(line, text_key, partition_key)
        if isinstance(found, str):
            malformed.append(Malformed(block.file, number, found))
        elif not found[0]:
            num_empty += 1
        else:
            documents.append(Document(found[0], block.file, number, found[1]))
    return Parsed(documents, malformed, num_lines, num_empty)


def _parse_line(line: bytes, text_key: str, partition_key: str | None) -> tuple[str, str] | str:
    """(text, partition) of a JSON line, or why there is none."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:  # bad UTF-8 and lone surrogates among them
        return f"no JSON: {error.msg} (column {error.colno})"
    text = _look_up(record, text_key)
    if not isinstance(text, str):
        return f'no text at "{text_key}"' if text is None else f'"{text_key}" holds {type(text).__name__}, not a string'
    if partition_key is None:
        return text, ""
    partition = _look_up(record, partition_key)
    if not isinstance(partition, str | int) or partition == "":
        return f'no value at "{partition_key}" to partition by'
    return text, str(partition)


def _look_up(record: Any, path: str) -> Any:
    """Value at a key or, where there is no such key, at a dotted path; None where either leads nowhere."""
    if isinstance(record, dict) and path in record:
        return record[path]
    for key in path.split("."):
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record


def _parse_text_file(block: Block, partition_key: str | None) -> Parsed:
    try:
        text = block.content.decode()
    except UnicodeDecodeError as error:
        return Parsed([], [Malformed(block.file, block.content.count(b"\n", 0, error.start) + 1, "not UTF-8")], 1, 0)
    if not text:
        return Parsed([], [], 1, 1)
    if partition_key is not None:
        reason = f'a text file has no "{partition_key}" to partition by'
        return Parsed([], [Malformed(block.file, 1, reason)], 1, 0)
    return Parsed([Document(text, block.file, 1, "")], [], 1, 0)
