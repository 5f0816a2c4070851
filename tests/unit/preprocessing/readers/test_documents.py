"""Pieces of inputs are read, unless the input changed after the run began."""

import errno
import os
from pathlib import Path
from unittest import mock

import pytest

from megatron_bipe.errors import DataError
from preprocessing.readers import documents
from preprocessing.readers.documents import DocumentReader, PieceEnd, read_input
from preprocessing.readers.inputs import HUB, Input, Piece, find_inputs
from preprocessing.readers.lines import LineReader
from preprocessing.readers.parse import Keys, Parsed
from tests.helpers.errors import raises


def touch(file: Path) -> None:
    """Change the date of a file, but not its size."""
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt"])
def test_read_file_changed_before_or_while_it_is_read_is_an_error(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text('{"text": "a"}\n')
    (item,) = find_inputs([str(file)])
    assert [parsed.documents[0].line for parsed in read_input(item, Keys())] == [1]
    reading = read_input(item, Keys())
    next(reading)
    touch(file)
    with raises(DataError, location=file, remedy="--overwrite"):
        list(reading)
    with raises(DataError, location=file, remedy="--overwrite"):
        next(read_input(item, Keys()))
    (item,) = find_inputs([str(file)])
    file.write_text('{"text": "a"}\n{"text": "b"}\n')
    with raises(DataError, location=file, remedy="--overwrite"):
        next(read_input(item, Keys()))
    file.unlink()
    with raises(DataError, os.strerror(errno.ENOENT), location=file):
        next(read_input(item, Keys()))


def test_read_hub_parts_are_counted_and_no_file_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Parsed([], [], 3, 0, 1), Parsed([], [], 4, 0, 1)]
    asked = []
    monkeypatch.setattr(documents, "read_hub", lambda *question: asked.append(question) or iter(parts))
    reader = DocumentReader(Keys())
    assert list(reader.read(Piece(Input("org/name", HUB, 5, "c0ffee"), 2, 4))) == parts * 2
    assert [question[:3] for question in asked] == [("org/name", 2, "c0ffee"), ("org/name", 3, "c0ffee")]
    assert reader.end == PieceEnd(14, 0, 0)


def test_read_pieces_name_where_they_start(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a"}\nbad\n{"text": "b"}\nbad\n')
    (item,) = find_inputs([str(file)])
    with DocumentReader(Keys()) as reader:
        first = list(reader.read(Piece(item, 0, 16)))
        end = reader.end
        second = list(reader.read(Piece(item, 16, item.size)))
        assert (end, reader.end) == (PieceEnd(2, 0, 2), PieceEnd(2, 2, 0))
    places = [(bad.file, bad.line) for parsed in (*first, *second) for bad in parsed.malformed]
    assert places == [(str(file), 2), (f"{file}, from byte 16", 2)]


def test_read_pieces_of_one_file_open_it_once(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n' * 9)
    first, second = find_inputs([str(tmp_path)])
    pieces = [Piece(first, 0, 50), Piece(first, 50, 126), Piece(second, 0, 126)]
    with mock.patch.object(documents, "LineReader", wraps=LineReader) as opened, DocumentReader(Keys()) as reader:
        found = [document for piece in pieces for parsed in reader.read(piece) for document in parsed.documents]
    assert [call.args[0].name for call in opened.call_args_list] == ["a.jsonl", "b.jsonl"]
    assert [document.file for document in found] == (
        [first.name] * 4 + [f"{first.name}, from byte 50"] * 5 + [second.name] * 9
    )
