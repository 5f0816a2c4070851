"""Read documents from pieces of inputs of any kind."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

from preprocessing.readers.content_check import require_json_lines, require_named_format
from preprocessing.readers.hub_dataset import read_hub
from preprocessing.readers.inputs import Input, Piece, require_unchanged
from preprocessing.readers.lines import LONGEST_LINE_BYTES, Content, LineReader, read_text_file, reading
from preprocessing.readers.parse import Keys, Parsed, parse_block


class PieceEnd(NamedTuple):
    """Counts of a piece that has been read, to check that it fits its neighbours."""

    num_lines: int  # newlines, or rows
    skipped_bytes: int  # of content at the start: the end of a line of an earlier piece
    overrun_bytes: int  # of content beyond the piece that belong to its last line


class DocumentReader:
    """Reader of pieces that keeps the last file open, so that the next piece of it needs no seek."""

    def __init__(self, keys: Keys, max_line_bytes: int = LONGEST_LINE_BYTES) -> None:
        self._keys, self._max_line_bytes = keys, max_line_bytes
        self._open: tuple[str, LineReader] | None = None
        self._close = ExitStack()
        self.end = PieceEnd(0, 0, 0)  # of the piece read last

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()

    def read(self, piece: Piece) -> Iterator[Parsed]:
        """Yield the documents that begin in the piece, in bounded batches.

        Raises:
            DataError: the input cannot be read, is damaged, not what its name says, or has changed since it was found;
                it has a line that is too long; or a package that reads it is missing.
        """
        with reading(piece.input.name):
            require_unchanged(piece.input)
            if piece.start == 0 and piece.input.kind.reader != "hub":
                require_named_format(Path(piece.input.name))
            yield from self._parse(piece)
            require_unchanged(piece.input)  # also not while it was read

    def _parse(self, piece: Piece) -> Iterator[Parsed]:
        if piece.input.kind.reader == "lines":
            yield from self._parse_lines(piece)
        elif piece.input.kind.reader == "text":
            yield parse_block(read_text_file(Path(piece.input.name), self._max_line_bytes), self._keys)
            self.end = PieceEnd(0, 0, 0)
        else:
            num_rows = 0
            for parsed in _read_rows(piece, self._keys):
                num_rows += parsed.num_lines
                yield parsed
            self.end = PieceEnd(num_rows, 0, 0)

    def _parse_lines(self, piece: Piece) -> Iterator[Parsed]:
        if self._open is None or self._open[0] != piece.input.name:
            self._close.close()
            reader = LineReader(Path(piece.input.name), self._max_line_bytes)
            self._open = piece.input.name, self._close.enter_context(reader)
        reader = self._open[1]
        # The number of lines before a piece is unknown until all is read: lines count from the piece's start.
        name = f"{piece.input.name}, from byte {piece.start}" if piece.start else piece.input.name
        for block in reader.blocks(piece.start, piece.stop):
            yield parse_block(block._replace(file=name), self._keys)
        self.end = PieceEnd(reader.num_lines, reader.skipped_bytes, reader.overrun_bytes)


def _read_rows(piece: Piece, keys: Keys) -> Iterator[Parsed]:
    name = piece.input.name
    if piece.input.kind.reader == "hub":
        for part in range(piece.start, piece.stop):
            yield from read_hub(name, part, piece.input.version, keys)
        return
    from preprocessing.readers.tables import read_arrow, read_parquet

    if piece.input.kind.reader == "parquet":
        yield from read_parquet(Path(name), piece.start, piece.stop, keys)
    else:
        yield from read_arrow(Path(name), keys)


def read_input(item: Input, keys: Keys, max_line_bytes: int = LONGEST_LINE_BYTES) -> Iterator[Parsed]:
    with DocumentReader(keys, max_line_bytes) as reader:
        yield from reader.read(Piece(item, 0, item.size))


def require_formats(inputs: Iterable[Input]) -> None:
    """Check the beginning of every file, so that a long run does not meet a wrong one after hours.

    Raises:
        DataError: a file is not what its name says, or does not begin as JSON lines do.
    """
    for item in inputs:
        if item.kind.reader == "hub":
            continue
        with reading(item.name):
            require_named_format(Path(item.name))
            if item.kind.reader == "lines":
                with Content(Path(item.name)) as content:
                    require_json_lines(next(content.advance(), b""), Path(item.name))
