"""Read blocks of bytes: the lines of a range of a `.jsonl` file, compressed or not, or a complete `.txt` file.

A line belongs to the range in whose content it begins. Any division of a file into ranges therefore gives every line
exactly once, without communication between readers.
"""

import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import zstandard

from megatron_bipe.errors import DataError
from preprocessing.readers.compressed import Content

BLOCK_BYTES = 1 << 21  # of text: few calls, and little of a worker's memory
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Block(NamedTuple):
    """Part of one file: complete JSON lines, or all of a text file."""

    file: str
    first_line: int  # number of the first line, from 1 at the start of the range
    content: bytes
    is_json: bool  # lines of JSON objects; else the text of one document
    read_bytes: int  # of the file on disk, since the block before: for the time left


class LineReader:
    """Reader of the lines of one file by ranges; consecutive ranges are read without seeking back.

    Args:
        file: opened here, and closed at the end of the `with` statement.

    Attributes:
        num_lines: newlines in the lines of the last range.
        skipped_bytes: content at the start of the last range: the end of a line that begins before it.
        overrun_bytes: content after the last range that belongs to its last line; the next range skips it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._content = Content(file)
        self._kept = b""  # content after the last line of the last range, from byte `_kept_at` of the file
        self._kept_at: int | None = None
        self._reported_bytes = self._stop = 0
        self.num_lines = self.skipped_bytes = self.overrun_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._content.__exit__()

    def blocks(self, start: int, stop: int, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
        """Yield the lines that begin in the content of bytes [start, stop), in blocks of about `block_bytes`."""
        self.num_lines = 0
        self._reported_bytes, self._stop = start, stop
        pending = bytearray()
        for chunk in self._owned_content(start, stop):
            searched = len(pending)  # beyond `block_bytes`, there is no newline before this offset
            pending += chunk
            while len(pending) >= block_bytes:
                end = pending.rfind(b"\n", 0, block_bytes) + 1 or pending.find(b"\n", max(searched, block_bytes)) + 1
                if end == 0:
                    break
                content = bytes(pending[:end])
                del pending[:end]
                searched = 0
                yield self._block(content)
        if pending:
            yield self._block(bytes(pending))

    def _block(self, content: bytes) -> Block:
        first_line, reported_bytes = self.num_lines + 1, self._reported_bytes
        self.num_lines += content.count(b"\n")
        self._reported_bytes = min(self._content.position, self._stop)
        return Block(str(self._file), first_line, content, True, self._reported_bytes - reported_bytes)

    def _owned_content(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield content from the first line that begins in the range to the end of the last one that does."""
        last = yield from self._beginning(start, stop)
        for chunk in self._content.advance(stop):
            if last is None:  # still inside a line that began before the range
                end = chunk.find(b"\n") + 1
                self.skipped_bytes += end or len(chunk)
                if end == 0:
                    continue
                last, chunk = b"\n", chunk[end:]
            if chunk:
                chunk = chunk.removeprefix(BYTE_ORDER_MARK) if last == b"" else chunk
                last = chunk[-1:]
                yield chunk
        self._kept, self._kept_at, self.overrun_bytes = b"", stop if last else None, 0
        if last and last != b"\n":
            yield from self._rest_of_line()

    def _beginning(self, start: int, stop: int) -> Generator[bytes, None, bytes | None]:
        """Go to the range's start; return None inside a line, else the last byte before (b"" at the file's start)."""
        kept, kept_at = self._kept, self._kept_at
        self._kept, self._kept_at = b"", None  # an interrupted range leaves nothing to continue from
        self.skipped_bytes = 0
        if kept_at == start and self._content.position <= stop:
            self.skipped_bytes = self.overrun_bytes
            if kept:
                yield kept
            return kept[-1:] or b"\n"
        begins_line = self._content.seek(start)
        return (b"\n" if start else b"") if begins_line else None

    def _rest_of_line(self) -> Iterator[bytes]:
        for chunk in self._content.advance():
            end = chunk.find(b"\n") + 1
            self.overrun_bytes += end or len(chunk)
            yield chunk[: end or len(chunk)]
            if end:
                self._kept = chunk[end:]
                break


def read_text_file(file: Path) -> Block:
    content = file.read_bytes()
    return Block(str(file), 1, content.removeprefix(BYTE_ORDER_MARK), False, len(content))


@contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """Turn failures to read a file into a `DataError` that names it."""
    try:
        yield
    except (zstandard.ZstdError, zlib.error, EOFError) as error:
        raise DataError(
            f"The data is damaged or truncated: {error}", remedy="Fetch or make the file again", location=file
        ) from error
    except OSError as error:
        raise DataError(f"The file cannot be read: {error.strerror or error}", location=file) from error
