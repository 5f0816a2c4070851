"""Content of a file by ranges of its bytes on disk: plain, `.gz` and `.zst` (one or several frames).

A range of a compressed file stands for the content that comes out while its bytes go in, so a file can be divided by
its size alone, before it is decompressed. Starting inside a plain file is free; a `.zst` file of many frames must be
decompressed from the frame before, and any other file from its beginning.
"""

import bisect
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import zstandard

READ_BYTES = 1 << 17
NEWLINE = ord("\n")
SKIPPABLE_MAGIC = range(0x184D2A50, 0x184D2A60)
LONGEST_HEADER_BYTES = 18  # of a zstd frame


class Content:
    """Content of a file, read forwards; `seek` goes anywhere.

    Args:
        file: `.gz` and `.zst` are decompressed.

    Attributes:
        position: bytes on disk consumed so far.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._kind = file.suffix if file.suffix in (".gz", ".zst") else ""
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
            chunk = self._raw.read(min(READ_BYTES, stop - self.position))
            if not chunk:
                raise EOFError(f"the file ends at byte {self.position}; it had {self._size} bytes")
            self.position += len(chunk)
            content = self._decoded(chunk) if self._kind else chunk
            if content:
                self._last_byte = content[-1]
                yield content
        if self.position >= self._size and self._in_frame:
            raise EOFError(f"the last {self._kind} frame is incomplete")

    def _restart(self, position: int) -> None:
        self._raw.seek(position)
        self.position = position
        self._last_byte = None if position else NEWLINE  # a file begins with a line
        self._in_frame = False
        self._decoder = self._new_decoder()

    def _new_decoder(self) -> Any:
        if self._kind == ".zst":
            # `zstandard.stream_reader` would end silently inside a truncated frame.
            return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)

    def _decoded(self, chunk: bytes) -> bytes:
        parts = []
        while chunk:
            if not self._in_frame and self._kind == ".gz" and not (chunk := chunk.lstrip(b"\0")):
                break  # padding after a member
            self._in_frame = True
            parts.append(self._decoder.decompress(chunk))
            chunk = b""
            if self._decoder.eof:
                chunk, self._decoder, self._in_frame = self._decoder.unused_data, self._new_decoder(), False
        return parts[0] if len(parts) == 1 else b"".join(parts)

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
