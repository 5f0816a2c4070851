"""Readers: which files, which blocks, which documents, and what is wrong with the rest."""

import gzip
import os
from pathlib import Path

import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bipe.errors import DataError
from preprocessing.readers import Block, find_inputs, parse_block, read_blocks


def lines_of(content: bytes, first_line: int = 1) -> Block:
    return Block("f.jsonl", first_line, content, True, len(content))


def texts_in(file: Path, block_bytes: int = 1 << 20) -> list[str]:
    parsed = [parse_block(block, "text", None) for block in read_blocks(file, block_bytes)]
    assert not any(part.malformed for part in parsed)
    return [document.text for part in parsed for document in part.documents]


def test_read_blocks_any_format_gives_the_same_texts(inputs: dict[str, Path], texts: list[str]) -> None:
    for kind in ("jsonl", "zst", "gz"):
        assert texts_in(inputs[kind]) == texts
    assert [text for file in find_inputs([str(inputs["txt"])]) for text in texts_in(file)] == texts


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=12),
    block_bytes=st.integers(1, 60),
    ends_with_newline=st.booleans(),
)
def test_read_blocks_any_block_size_keeps_bytes_and_line_numbers(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block_bytes: int, ends_with_newline: bool
) -> None:
    file = tmp_path_factory.mktemp("blocks") / "x.jsonl"
    content = b"\n".join([b"{}", *lines]) + (b"\n" if ends_with_newline else b"")
    file.write_bytes(content)
    blocks = list(read_blocks(file, block_bytes))
    assert b"".join(block.content for block in blocks) == content
    assert sum(block.read_bytes for block in blocks) == len(content)
    before = b""
    for block in blocks:
        assert block.first_line == before.count(b"\n") + 1
        assert len(block.content) <= block_bytes or block.content.count(b"\n", 0, -1) == 0  # or a single long line
        before += block.content


def test_read_blocks_large_file_comes_in_bounded_blocks_of_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl.zst"
    file.write_bytes(zstandard.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(100_000))))
    blocks = list(read_blocks(file, block_bytes=100_000))
    assert len(blocks) > 10
    assert all(block.content.endswith(b"\n") and len(block.content) <= 100_000 for block in blocks)
    assert texts_in(file, 100_000) == [str(n) for n in range(100_000)]


def test_read_blocks_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfa")
    assert texts_in(tmp_path / "a.jsonl") == texts_in(tmp_path / "b.txt") == ["a"]


@pytest.mark.parametrize("kind", ["zst", "gz"])
@pytest.mark.parametrize("damage", ["cut short", "no such format", "flipped"])
def test_read_blocks_damaged_compression_is_named(tmp_path: Path, kind: str, damage: str) -> None:
    content = b"".join(orjson.dumps({"text": os.urandom(50).hex()}) + b"\n" for _ in range(3000))
    packed = bytearray(
        zstandard.ZstdCompressor(write_checksum=True).compress(content) if kind == "zst" else gzip.compress(content)
    )
    if damage == "cut short":
        del packed[-20:]
    elif damage == "flipped":
        packed[len(packed) // 2 : len(packed) // 2 + 40] = bytes(40)
    else:
        packed[:4] = b"none"
    file = tmp_path / f"x.jsonl.{kind}"
    file.write_bytes(packed)
    with pytest.raises(DataError, match=r"damaged or cut short.*x\.jsonl"):
        list(read_blocks(file))


def test_read_blocks_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read.*gone\.jsonl"):
        list(read_blocks(tmp_path / "gone.jsonl"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "no JSON"),
        (b'{"text": "\\ud800"}', "no JSON"),  # half a surrogate pair
        (b'{"text": "\xff"}', "no JSON"),  # not UTF-8
        (b'["text"]', 'no text at "text"'),
        (b'{"txt": "a"}', 'no text at "text"'),
        (b'{"text": null}', 'no text at "text"'),
        (b'{"text": 3}', '"text" holds int, not a string'),
        (b'{"text": "a"} {}', "no JSON"),
    ],
)
def test_parse_block_malformed_line_is_named_and_its_neighbours_kept(line: bytes, reason: str) -> None:
    parsed = parse_block(lines_of(b'{"text": "before"}\n\n' + line + b'\n{"text": "after"}', 7), "text", None)
    assert [(document.text, document.line) for document in parsed.documents] == [("before", 7), ("after", 10)]
    assert [(bad.file, bad.line) for bad in parsed.malformed] == [("f.jsonl", 9)]
    assert reason in parsed.malformed[0].reason
    assert parsed.num_lines == 3


def test_parse_block_empty_text_is_counted_and_space_is_text() -> None:
    parsed = parse_block(lines_of(b'{"text": ""}\n{"text": " "}\r\n \n'), "text", None)
    assert [document.text for document in parsed.documents] == [" "]
    assert (parsed.num_empty, parsed.num_lines, parsed.malformed) == (1, 2, [])


def test_parse_block_dotted_keys_reach_nested_values_and_literal_ones_win() -> None:
    line = b'{"meta": {"set": "nested", "n": 5, "body": "t"}, "meta.lit": "literal"}'
    for key, value in (("meta.set", "nested"), ("meta.n", "5"), ("meta.lit", "literal")):
        assert parse_block(lines_of(line), "meta.body", key).documents[0].partition == value


@pytest.mark.parametrize("meta", [b"{}", b'"x"', b'{"set": null}', b'{"set": ""}', b'{"set": ["a"]}'])
def test_parse_block_missing_partition_is_malformed(meta: bytes) -> None:
    parsed = parse_block(lines_of(b'{"text": "a", "meta": ' + meta + b"}"), "text", "meta.set")
    assert not parsed.documents
    assert 'no value at "meta.set"' in parsed.malformed[0].reason


def test_parse_block_text_file_bad_bytes_and_missing_partition_are_malformed() -> None:
    block = Block("f.txt", 1, b"a\nb\xff", False, 4)
    assert (parsed := parse_block(block, "text", None)).malformed[0].line == 2
    assert parsed.malformed[0].reason == "not UTF-8"
    good = block._replace(content=b"a")
    assert "partition" in parse_block(good, "text", "meta.set").malformed[0].reason
    assert parse_block(good._replace(content=b""), "text", None).num_empty == 1


def test_find_inputs_globs_folders_and_files_keep_the_order_given(inputs: dict[str, Path]) -> None:
    folder = inputs["jsonl"].parent
    (folder / "notes.md").write_text("not an input")
    found = find_inputs([str(inputs["gz"]), str(folder / "*.jsonl*"), str(folder)])
    names = [str(file.relative_to(folder)) for file in found]
    assert names == ["c.jsonl.gz", "a.jsonl", "b.jsonl.zst", *(f"d/{n}.txt" for n in range(5))]


@pytest.mark.parametrize("name", ["gone.jsonl", "*.jsonl", "empty", "notes.md"])
def test_find_inputs_nothing_usable_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"\.jsonl\.zst"):
        find_inputs([str(tmp_path / name)])
