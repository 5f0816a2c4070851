"""Blocks and rows are parsed into documents, and malformed ones are named."""

import json
import math

import pytest

from preprocessing.readers.lines import Block
from preprocessing.readers.parse import Keys, parse_block, parse_rows


def lines_of(content: bytes, first_line: int = 1) -> Block:
    return Block("f.jsonl", first_line, content, True, len(content))


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
        (b'{"text": NaN}', '"text" holds float, not a string'),
        (b'{"text": "\\udc00", "score": NaN}', "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"text": "\xff", "score": NaN}', "no JSON"),
    ],
)
def test_parse_block_malformed_line_is_named_and_its_neighbours_kept(line: bytes, reason: str) -> None:
    parsed = parse_block(lines_of(b'{"text": "before"}\n\n' + line + b'\n{"text": "after"}', 7), Keys())
    assert [(document.text, document.line) for document in parsed.documents] == [("before", 7), ("after", 10)]
    assert [(bad.file, bad.line) for bad in parsed.malformed] == [("f.jsonl", 9)]
    assert reason in parsed.malformed[0].reason
    assert parsed.num_lines == 3


@pytest.mark.parametrize(
    "fields",
    [{"score": math.nan}, {"meta": {"x": [math.inf, -math.inf]}}, {"other": "\ud83d"}],
)
def test_parse_block_value_that_only_python_writes_costs_no_text(fields: dict[str, object]) -> None:
    line = json.dumps({"text": "a \u4e2d", "set": "s"} | fields).encode()
    (document,) = parse_block(lines_of(line), Keys("text", "set")).documents
    assert (document.text, document.partition) == ("a \u4e2d", "s")
    assert parse_block(lines_of(line), Keys("text", next(iter(fields)))).malformed


def test_parse_block_good_lines_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", None)
    assert len(parse_block(lines_of(b'{"text": "a"}\n' * 3), Keys()).documents) == 3


def test_parse_block_empty_text_is_counted_and_space_is_text() -> None:
    parsed = parse_block(lines_of(b'{"text": ""}\n{"text": " "}\r\n \n'), Keys())
    assert [document.text for document in parsed.documents] == [" "]
    assert (parsed.num_empty, parsed.num_lines, parsed.malformed) == (1, 2, [])


def test_parse_block_dotted_keys_reach_nested_values_and_literal_ones_win() -> None:
    line = b'{"meta": {"set": "nested", "n": 5, "body": "t"}, "meta.lit": "literal"}'
    for key, value in (("meta.set", "nested"), ("meta.n", "5"), ("meta.lit", "literal")):
        assert parse_block(lines_of(line), Keys("meta.body", key)).documents[0].partition == value


@pytest.mark.parametrize("meta", [b"{}", b'"x"', b'{"set": null}', b'{"set": ""}', b'{"set": ["a"]}'])
def test_parse_block_missing_partition_is_malformed(meta: bytes) -> None:
    parsed = parse_block(lines_of(b'{"text": "a", "meta": ' + meta + b"}"), Keys("text", "meta.set"))
    assert not parsed.documents
    assert 'no value at "meta.set"' in parsed.malformed[0].reason


def test_parse_block_text_file_bad_bytes_and_missing_partition_are_malformed() -> None:
    block = Block("f.txt", 1, b"a\nb\xff", False, 4)
    assert (parsed := parse_block(block, Keys())).malformed[0].line == 2
    assert parsed.malformed[0].reason == "not UTF-8"
    good = block._replace(content=b"a")
    assert "partition" in parse_block(good, Keys("text", "meta.set")).malformed[0].reason
    assert parse_block(good._replace(content=b""), Keys()).num_empty == 1


def test_parse_rows_are_counted_from_the_first() -> None:
    rows = [{"text": "a", "meta": {"set": "x"}}, {"text": None}, {"text": "", "meta": {"set": "x"}}]
    parsed = parse_rows("f.parquet", 5, rows, Keys("text", "meta.set"), 9)
    assert [(document.line, document.partition) for document in parsed.documents] == [(5, "x")]
    assert [bad.line for bad in parsed.malformed] == [6]
    assert (parsed.num_lines, parsed.num_empty, parsed.read_bytes) == (3, 1, 9)
