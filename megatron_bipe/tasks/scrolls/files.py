"""SCROLLS's public files: one JSON object a line, in a file for each task and split, or a zip file for each task."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import orjson

from megatron_bipe.errors import DataError

FIELDS = ("id", "pid", "input", "output")


class Row(NamedTuple):
    """An input with one of its outputs."""

    id: str  # of the input: rows that share it differ in their output
    pid: str  # of the pair
    input: str
    output: str | None  # None in test splits, and where it has no text
    place: str  # for messages


class Question(NamedTuple):
    """An input with all its outputs."""

    id: str
    input: str
    outputs: tuple[str, ...]  # none in test splits


def read_rows(folder: Path, task: str, split: str) -> Iterator[Row]:
    """Rows of a split, in the order of the file.

    Args:
        folder: has TASK/SPLIT.jsonl, or TASK.zip with that in it, as the Hub has it.
        task: name.
        split: train, validation or test.

    Raises:
        DataError: there is no such file, or a line is not a row; its place and field are named.
    """
    with _opened(folder, task, split) as (stream, name):
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _row(line, f"{name}, line {number}")


def questions(rows: Iterable[Row]) -> list[Question]:
    """Inputs in the order of their first rows, each with the outputs of all its rows."""
    inputs: dict[str, str] = {}
    outputs: dict[str, list[str]] = {}
    for row in rows:
        inputs.setdefault(row.id, row.input)
        outputs.setdefault(row.id, []).extend([] if row.output is None else [row.output])
    return [Question(id_, text, tuple(outputs[id_])) for id_, text in inputs.items()]


def _row(line: bytes, place: str) -> Row:
    remedy = "Fetch the file again, or mend the line"
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"the line is no JSON: {error}", remedy=remedy, location=place) from error
    if not isinstance(content, dict):
        raise DataError(f"the line is a JSON {type(content).__name__}, not an object", remedy=remedy, location=place)
    missing = [field for field in FIELDS if field not in content]
    if missing:
        what = f"the object has no {', '.join(map(repr, missing))}; its fields must be {', '.join(FIELDS)}"
        raise DataError(what, remedy=remedy, location=place)
    for field in FIELDS:
        value = content[field]
        if not isinstance(value, str) and not (field == "output" and value is None):
            raise DataError(f"{field!r} is {value!r:.60}, and must be a text", remedy=remedy, location=place)
    if not content["input"].strip():
        raise DataError("'input' has no text", remedy=remedy, location=place)
    output = content["output"]
    return Row(content["id"], content["pid"], content["input"], output if output and output.strip() else None, place)


@contextmanager
def _opened(folder: Path, task: str, split: str) -> Iterator[tuple[BinaryIO, str]]:
    """The lines of a split, and what to call them."""
    member = f"{task}/{split}.jsonl"
    plain, packed = folder / member, folder / f"{task}.zip"
    try:
        if plain.is_file():
            with plain.open("rb") as stream:
                yield stream, str(plain)
        elif packed.is_file():
            with zipfile.ZipFile(packed) as archive, archive.open(member) as unpacked:
                yield cast(BinaryIO, unpacked), f"{packed}, {member}"
        else:
            raise DataError(
                f"there is neither {member} nor {packed.name}",
                remedy=f"Fetch it: python tools/download_data.py --dataset tau/scrolls --include {packed.name} "
                f"--output {folder}",
                location=folder,
            )
    except KeyError as error:
        raise DataError(
            f"it has no {member}", remedy="Name another split, or fetch it again", location=packed
        ) from error
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        what = f"the file cannot be read: {error}"
        raise DataError(what, remedy="Fetch it again", location=plain if plain.exists() else packed) from error
