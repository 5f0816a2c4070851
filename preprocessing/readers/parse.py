"""Parse blocks of bytes, or rows of tables, into documents and malformed lines."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import orjson

from megatron_bipe.types import Document
from preprocessing.readers.lines import Block


class Keys(NamedTuple):
    """Keys, or dotted paths, of the fields that are read from a record."""

    text: str = "text"
    partition: str | None = None  # of the value by which the data is partitioned; None: not partitioned
    keep_empty: bool = False  # make documents of texts without characters, which are skipped otherwise

    def in_use(self) -> list[str]:
        """Return the keys that are given, each once."""
        return list(dict.fromkeys(key for key in (self.text, self.partition) if key is not None))


class Malformed(NamedTuple):
    """Line (or row of a table) that is not a document, and the reason."""

    file: str
    line: int  # from 1, at the start of the file or range that was read
    reason: str


class Parsed(NamedTuple):
    """Usable documents and malformed lines, each in order, with counts."""

    documents: list[Document]
    malformed: list[Malformed]
    num_lines: int  # lines that are not blank
    num_empty: int
    read_bytes: int  # of the file on disk


def parse_block(block: Block, keys: Keys) -> Parsed:
    """Return the documents of a block, and the lines that hold none."""
    if not block.is_json:
        return _parse_text_file(block, keys.partition)
    lines = ((number, line) for number, line in enumerate(block.content.split(b"\n"), start=block.first_line) if line)
    found = ((number, _parse_line(line, keys)) for number, line in lines if not line.isspace())
    return _collect(block.file, found, block.read_bytes, keys.keep_empty)


def parse_rows(file: str, first_row: int, records: Iterable[Any], keys: Keys, read_bytes: int) -> Parsed:
    """Return the documents of a table's rows, each a dictionary; `first_row` is the number of the first, from 1."""
    found = ((number, _parse_record(record, keys)) for number, record in enumerate(records, start=first_row))
    return _collect(file, found, read_bytes, keys.keep_empty)


def _collect(
    file: str, found: Iterable[tuple[int, tuple[str, str] | str]], read_bytes: int, keep_empty: bool
) -> Parsed:
    documents: list[Document] = []
    malformed: list[Malformed] = []
    num_empty = 0
    for number, item in found:
        if isinstance(item, str):
            malformed.append(Malformed(file, number, item))
        elif not item[0] and not keep_empty:
            num_empty += 1
        else:
            documents.append(Document(item[0], file, number, item[1]))
    num_lines = len(documents) + len(malformed) + num_empty
    return Parsed(documents, malformed, num_lines, num_empty, read_bytes)


def _parse_line(line: bytes, keys: Keys) -> tuple[str, str] | str:
    """Return (text, partition) of a JSON line, or the reason why there is none."""
    try:
        return _parse_record(orjson.loads(line), keys)
    except orjson.JSONDecodeError as error:  # also for bad UTF-8 and lone surrogates
        found = _parse_leniently(line, keys)
        return f"no JSON: {error.msg} (column {error.colno})" if found is None else found


def _parse_leniently(line: bytes, keys: Keys) -> tuple[str, str] | str | None:
    """Parse with Python's `json`, whose `dumps` writes NaN, Infinity and lone surrogates; return None if it fails, too.

    Such values may be in fields that are not read. A text with a lone surrogate has no UTF-8 form.
    """
    try:
        found = _parse_record(json.loads(line.decode()), keys)
        "".join(found).encode()
    except (ValueError, RecursionError):
        return None
    return found


def _parse_record(record: Any, keys: Keys) -> tuple[str, str] | str:
    text = _look_up(record, keys.text)
    if text is None:
        return f'no text at "{keys.text}"'
    if not isinstance(text, str):
        return f'"{keys.text}" holds {type(text).__name__}, not a string'
    if keys.partition is None:
        return text, ""
    partition = _look_up(record, keys.partition)
    if not isinstance(partition, str | int) or partition == "":
        return f'no value at "{keys.partition}" to partition by'
    return text, str(partition)


def _look_up(record: Any, path: str) -> Any:
    """Return the value at a key or, if there is no such key, at a dotted path; None if there is neither."""
    if isinstance(record, dict) and path in record:
        return record[path]
    for key in path.split("."):
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record


def _parse_text_file(block: Block, partition_key: str | None) -> Parsed:
    found: tuple[int, tuple[str, str] | str]
    try:
        found = 1, (block.content.decode(), "")
    except UnicodeDecodeError as error:
        found = block.content.count(b"\n", 0, error.start) + 1, "not UTF-8"
    else:
        if block.content and partition_key is not None:
            found = 1, f'a text file has no "{partition_key}" to partition by'
    return _collect(block.file, [found], block.read_bytes, keep_empty=False)  # an empty file is not a record
