"""Pieces of inputs are read, unless the input changed after the run began."""

import bz2
import errno
import gzip
import lzma
import os
from pathlib import Path
from unittest import mock

import pytest
import zstandard

from megatron_bipe.errors import DataError
from preprocessing.readers import documents
from preprocessing.readers.documents import DocumentReader, PieceEnd, read_input, require_formats
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


ONE = b'{"text": "a"}\n'
ARRAY = b'[\n  {\n    "text": "a"\n  },\n  {\n    "text": "b"\n  }\n]\n'
TAR = b"x.jsonl".ljust(257, b"\0") + b"ustar\x0000" + bytes(247) + ONE
LFS = b"version https://git-lfs.github.com/spec/v1\noid"
WRONG = {
    "array": ("x.json", b' [{"text": "a"}, {"text": "b"}]', "array", "jq -c '.[]'"),
    "array over lines": ("x.json", ARRAY, "array", "jq"),
    "array, a record in a line": ("x.jsonl", b'[\n{"text": "a"},\n{"text": "b"}\n]', "array", "jq"),
    "packed array": ("x.json.gz", gzip.compress(ARRAY), "array", "jq"),
    "object over lines": ("x.json", b'{\n  "text": "a",\n "b": 1}', "'{'", "jq -c ."),
    "object over lines, from its first key": ("x.json", b'{"text": "a",\n "b": 1}', '{"text": "a",', "jq"),
    "gzip": ("x.jsonl", gzip.compress(ONE), "gzip", ".gz"),
    "zstd": ("x.txt", zstandard.compress(ONE), "zstd", ".zst"),
    "bzip2": ("x.jsonl.gz", bz2.compress(ONE), "bzip2", ".bz2"),
    "xz": ("x.jsonl.zst", lzma.compress(ONE), "xz", ".xz"),
    "text": ("x.jsonl.gz", ONE, "plain text", "without .gz"),
    "prose": ("x.txt.ZST", "Ça va ?\n".encode(), "plain text", "without .zst"),
    "zip": ("x.json", b"PK\x03\x04abc", "zip", "Unpack"),
    "parquet": ("x.jsonl", b"PAR1\x15\x04", "parquet", ".parquet"),
    "lines": ("x.parquet", gzip.compress(ONE), "gzip", ".gz"),
    "UTF-16": ("x.jsonl", ONE.decode().encode("utf-16"), "UTF-16", "iconv"),
    "UTF-16 without a mark": ("x.jsonl", ONE.decode().encode("utf-16-le"), "UTF-16", "iconv"),
    "text in UTF-16": ("x.txt", ONE.decode().encode("utf-16-be"), "UTF-16", "iconv"),
    "text in marked UTF-16": ("x.txt", ONE.decode().encode("utf-16"), "UTF-16", "iconv"),
    "LFS": ("x.parquet", LFS, "LFS", "git lfs pull"),
    "HTML": ("x.jsonl", b"\n<!DOCTYPE html><html>", "HTML", "Fetch"),
    "XML": ("x.jsonl", b'<?xml version="1.0"?>\n<Error>', "XML", "Fetch"),
    "objects in one line": ("x.json", ONE.rstrip() * 3, "several JSON objects", "jq -c ."),
    "lines of an old Mac": ("x.jsonl", ONE.replace(b"\n", b"\r") * 3, "several JSON objects", "jq -c ."),
    "packed twice": ("x.jsonl.gz", gzip.compress(gzip.compress(ONE)), "gzip", "Decompress"),
    "packed archive": ("x.jsonl.gz", gzip.compress(TAR), "tar", "Unpack"),
    "archive": ("x.jsonl", TAR, "tar", "Unpack"),
    "packed LFS": ("x.jsonl.zst", zstandard.compress(LFS), "LFS", "git lfs pull"),
    "nothing in gzip": ("x.jsonl.gz", b"", "empty", "again"),
    "nothing in zstd": ("x.txt.ZST", b"", "empty", "again"),
}


@pytest.mark.parametrize("case", WRONG)
def test_read_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, case: str) -> None:
    name, content, what, remedy = WRONG[case]
    (tmp_path / name).write_bytes(content)
    (item,) = find_inputs([str(tmp_path / name)])
    with raises(DataError, what, location=tmp_path / name, remedy=remedy):
        list(read_input(item, Keys()))
    if "text in UTF-16" not in case:
        with raises(DataError, what, location=tmp_path / name, remedy=remedy):
            require_formats([item])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", b""),
        ("x.json", b"\n\n \n" + ONE),
        ("x.json", ONE.rstrip()),
        ("x.jsonl", b'{"text": "a",}\n' + ONE),
        ("x.jsonl", b'{"text": "cut off\n' + ONE),
        ("x.jsonl", b'{"text": "a"} and more\n' + ONE),
        ("x.jsonl", b"\xef\xbb\xbf" + ONE),
        ("x.jsonl", b'{"text": "a", "b": NaN}\n'),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("x.jsonl.zst", b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstandard.compress(ONE)),
        ("x.txt", b"[a]\n{\n\0\0"),
        ("x.txt", b"<html>"),
        ("x.txt", b""),
    ],
    ids=repr,
)
def test_read_file_that_is_right_or_has_a_bad_line_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (item,) = find_inputs([str(tmp_path / name)])
    require_formats([item])
    parsed = list(read_input(item, Keys()))
    assert sum(len(part.documents) for part in parsed) == (ONE in content or b"NaN" in content or (name != "x.txt" and
        ONE.rstrip() == content) or "zst" in name or content[:1] in (b"[", b"<"))  # fmt: skip


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
