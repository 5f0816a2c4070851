"""Read ranges of files as blocks of bytes: lines of a JSON lines file, or a complete text file, plain or compressed.

A line belongs to the range in whose content it begins. Any division of a file into ranges therefore gives every line
exactly once, without communication between readers.

A range of a compressed file stands for the content that comes out while its bytes go in, so a file can be divided by
its size alone, before it is decompressed. Starting inside a plain file is free; a `.zst` file of many frames must be
decompressed from the frame before, and any other file from its beginning.

Memory is bounded whatever a file contains: a compressed file is decompressed a little at a time, and a line that is
longer than a limit is an error.
"""

import bisect
import bz2
import lzma
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import zstandard

from megatron_bipe.errors import DataError
from preprocessing.readers.content_check import BYTE_ORDER_MARK, require_json_lines, require_text

BLOCK_BYTES = 1 << 21  # of text: few calls, and little of a worker's memory
READ_BYTES = 1 << 17
LONGEST_LINE_BYTES = 1 << 28  # far above any document that is text; a worker holds it about four times
MAX_HISTORY_BYTES = 1 << 31  # to which data may refer back; files of `zstd --long=31` need it
NEWLINE = ord("\n")
SKIPPABLE_MAGIC = range(0x184D2A50, 0x184D2A60)  # of a zstd frame without content
LONGEST_HEADER_BYTES = 18  # of a zstd frame


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
        max_line_bytes: limit on the length of a line.

    Attributes:
        num_lines: newlines in the lines of the last range.
        skipped_bytes: content at the start of the last range: the end of a line that begins before it.
        overrun_bytes: content after the last range that belongs to its last line; the next range skips it.
    """

    def __init__(self, file: Path, max_line_bytes: int = LONGEST_LINE_BYTES) -> None:
        self._file, self._max_line_bytes = file, max_line_bytes
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
        """Yield the lines that begin in the content of bytes [start, stop), in blocks of about `block_bytes`.

        Raises:
            DataError: a line is longer than the limit, or the file does not begin as JSON lines do.
        """
        self.num_lines = 0
        self._reported_bytes, self._stop = start, stop
        block_bytes = min(block_bytes, self._max_line_bytes + 1)
        pending = bytearray()
        for chunk in self._owned_content(start, stop):
            searched = len(pending)  # beyond `block_bytes`, there is no newline before this offset
            pending += chunk
            while len(pending) >= block_bytes:
                end = pending.rfind(b"\n", 0, block_bytes) + 1 or pending.find(b"\n", max(searched, block_bytes)) + 1
                if end == 0:
                    break
                self._require_line(end - 1, start)
                content = bytes(pending[:end])
                del pending[:end]
                searched = 0
                yield self._block(content)
            self._require_line(len(pending), start)
        if pending:
            yield self._block(bytes(pending))

    def _require_line(self, num_bytes: int, start: int) -> None:
        """Raise `DataError` for a block, or the start of a line, that is longer than a line may be.

        A block is longer only if it is one line.
        """
        if num_bytes > self._max_line_bytes:
            where = f", counted from byte {start}" if start else ""
            raise DataError(
                f"Line {self.num_lines + 1}{where} has more than {self._max_line_bytes} bytes",
                remedy="If the file is what it should be, allow longer lines with --max-line-bytes; each worker needs "
                "about four times the length of the longest as memory",
                location=self._file,
            )

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
                if last == b"":
                    require_json_lines(chunk, self._file)
                    chunk = chunk.removeprefix(BYTE_ORDER_MARK)
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


def read_text_file(file: Path, max_bytes: int = LONGEST_LINE_BYTES) -> Block:
    """Return all of a text file.

    Raises:
        DataError: it is longer than the limit, or not UTF-8 or ASCII.
    """
    content = bytearray()
    with Content(file) as opened:
        for chunk in opened.advance():
            content += chunk
            if len(content) > max_bytes:
                raise DataError(
                    f"The text, which is one document, has more than {max_bytes} bytes",
                    remedy="Divide it into documents, or allow longer ones with --max-line-bytes",
                    location=file,
                )
        size = opened.position
    require_text(content, file)
    return Block(str(file), 1, bytes(content).removeprefix(BYTE_ORDER_MARK), False, size)


@contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """Turn failures to read an input into a `DataError` that names it."""
    try:
        yield
    except ImportError as error:
        raise DataError(
            f"This input needs a package that is not installed: {error}",
            remedy="Run pip install datasets",
            location=file,
        ) from error
    except (zstandard.ZstdError, zlib.error, lzma.LZMAError, EOFError) as error:
        raise _damaged_error(file, error) from error
    except OSError as error:
        if error.errno is None:  # from bz2
            raise _damaged_error(file, error) from error
        raise DataError(f"The file cannot be read: {error.strerror or error}", location=file) from error


def _zst_decoder() -> Any:
    # `zstandard.stream_reader` would end silently inside a truncated frame.
    return zstandard.ZstdDecompressor(max_window_size=MAX_HISTORY_BYTES).decompressobj()


def _damaged_error(file: Path | str, error: Exception) -> DataError:
    return DataError(f"The data is damaged or truncated: {error}", remedy="Fetch or make the file again", location=file)


class Decoder(NamedTuple):
    """How files of a compression are read."""

    new: Callable[[], Any]
    step_bytes: int  # compressed data for one call, so that its result is bounded


DECODERS = {
    ".gz": Decoder(
        lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), 1 << 14
    ),  # at most 1,032 bytes a byte, so 16 MiB
    ".zst": Decoder(_zst_decoder, 1 << 11),  # at most 64 MiB, 128 KiB for 4 bytes
    ".bz2": Decoder(bz2.BZ2Decompressor, 1 << 5),  # at most one block, so 44 MiB
    ".xz": Decoder(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_HISTORY_BYTES), 1 << 10),
}


class Content:
    """Content of a file, read forwards; `seek` goes anywhere.

    Args:
        file: decompressed if its name ends with one of `DECODERS`, in any case.

    Attributes:
        position: bytes on disk consumed so far.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._kind = suffix if (suffix := file.suffix.lower()) in DECODERS else ""
        self._raw: BinaryIO = file.open("rb")
        self._size = os.fstat(self._raw.fileno()).st_size
        self._last_byte: int | None = None  # of the content so far
        self._frames = [0]  # starts of the .zst frames known so far
        self._restart(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def seek(self, start: int) -> bool:
        """Go to where the content of byte `start` begins; return True if a line begins there."""
        # Only content shows whether a line begins, and a frame may have none: go back until there is some.
        starts = self._frames_before(start) if self._kind == ".zst" else [0 if self._kind else max(start - 1, 0)]
        if not self._kind or not starts[-1] <= self.position <= start:
            self._restart(starts[-1])
        self._skip_to(start)
        while self._last_byte is None:
            starts.pop()
            self._restart(starts[-1])
            self._skip_to(start)
        return self._last_byte == NEWLINE

    def advance(self, stop: int | None = None) -> Iterator[bytes]:
        """Yield content from here up to where the content of byte `stop` begins, by default to the end of the file.

        Raises:
            EOFError: the file ends before `stop`, or inside compressed data.
        """
        stop = self._size if stop is None else stop
        while self.position < stop:
            content = self._read_compressed(stop) if self._kind else self._read_raw(READ_BYTES, stop)
            if content:
                self._last_byte = content[-1]
                yield content
        if self.position >= self._size and self._in_frame:
            raise EOFError(f"the last {self._kind} frame is incomplete")

    def _read_raw(self, num_bytes: int, stop: int) -> bytes:
        chunk = self._raw.read(min(num_bytes, stop - self.position))
        if not chunk:
            raise EOFError(f"the file ends at byte {self.position}; it had {self._size} bytes")
        self.position += len(chunk)
        return chunk

    def _read_compressed(self, stop: int) -> bytes:
        """Return the content of at least one step, and of further ones while it is short."""
        parts: list[bytes] = []
        size, step_bytes = 0, DECODERS[self._kind].step_bytes
        while self.position < stop and size < READ_BYTES:
            parts.append(self._decoded(self._read_raw(step_bytes, stop)))
            size += len(parts[-1])
        return b"".join(parts)

    def _restart(self, position: int) -> None:
        self._raw.seek(position)
        self.position = position
        self._last_byte = None if position else NEWLINE  # a file begins with a line
        self._in_frame = False
        self._decoder = self._new_decoder()

    def _new_decoder(self) -> Any:
        return DECODERS[self._kind].new() if self._kind else None

    def _decoded(self, chunk: bytes) -> bytes:
        parts: list[bytes] = []
        while chunk:
            if not self._in_frame and self._kind in (".gz", ".xz") and not (chunk := chunk.lstrip(b"\0")):
                break  # padding after a member or stream
            self._in_frame = True
            content: bytes = self._decoder.decompress(chunk)
            if not self._decoder.eof:
                return b"".join([*parts, content]) if parts else content
            parts.append(content)
            chunk, self._decoder, self._in_frame = self._decoder.unused_data, self._new_decoder(), False
        return b"".join(parts)

    def _skip_to(self, start: int) -> None:
        for _ in self.advance(start):
            pass

    def _frames_before(self, start: int) -> list[int]:
        """Return the starts of the frames that begin before byte `start`; the first is 0."""
        while (known := self._frames[-1]) < start:
            following = _frame_end(self._raw.fileno(), known, start)
            if following is None or following >= self._size:
                break
            self._frames.append(following)
        return self._frames[: max(bisect.bisect_left(self._frames, start), 1)]


def _frame_end(descriptor: int, start: int, enough: int) -> int | None:
    """Return the byte after the zstd frame at `start`, read from its block headers; None if it is beyond `enough`.

    Source: RFC 8878, section 3.1.
    """
    head = os.pread(descriptor, LONGEST_HEADER_BYTES, start)
    if int.from_bytes(head[:4], "little") in SKIPPABLE_MAGIC:
        return start + 8 + int.from_bytes(head[4:8], "little")
    offset = start + zstandard.frame_header_size(head)
    checksum_bytes = 4 if zstandard.get_frame_parameters(head).has_checksum else 0
    while offset <= enough:
        header = os.pread(descriptor, 3, offset)
        if len(header) < 3:
            return None  # truncated: decompression will report it
        word = int.from_bytes(header, "little")
        is_last, kind, size = word & 1, word >> 1 & 3, word >> 3
        offset += 3 + (1 if kind == 1 else size)  # kind 1 is one byte, repeated
        if is_last:
            return offset + checksum_bytes
    return None
