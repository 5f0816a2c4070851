"""SCROLLS's public files: one JSON object per line, one file per task and split or one zip file per task."""

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

    id: str  # of the input; its rows differ in their outputs
    pid: str  # of the pair
    input: str
    output: str | None  # None in test splits and if it has no text
    location: str  # for messages


class Question(NamedTuple):
    """An input with all its outputs."""

    id: str
    input: str
    outputs: tuple[str, ...]  # empty in test splits


def read_rows(folder: Path, task: str, split: str) -> Iterator[Row]:
    """Read the rows of a split in the order of the file.

    Args:
        folder: contains TASK/SPLIT.jsonl, or TASK.zip with that file, as on the Hub.
        task: name of the task.
        split: train, validation or test.

    Raises:
        DataError: there is no such file, or a line is not a row; the error names its location and field.
    """
    with _opened(folder, task, split) as (stream, name):
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _row(line, f"{name}, line {number}")


def questions(rows: Iterable[Row]) -> list[Question]:
    """Return the inputs in the order of their first rows, each with the outputs of all its rows."""
    inputs: dict[str, str] = {}
    outputs: dict[str, list[str]] = {}
    for row in rows:
        inputs.setdefault(row.id, row.input)
        outputs.setdefault(row.id, []).extend([] if row.output is None else [row.output])
    return [Question(id_, text, tuple(outputs[id_])) for id_, text in inputs.items()]


def _row(line: bytes, location: str) -> Row:
    remedy = "Download the file again, or fix the line"
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"the line is not JSON: {error}", remedy=remedy, location=location) from error
    if not isinstance(content, dict):
        raise DataError(f"the line is a JSON {type(content).__name__}, not an object", remedy=remedy, location=location)
    missing = [field for field in FIELDS if field not in content]
    if missing:
        what = f"the object has no {', '.join(map(repr, missing))}; its fields must be {', '.join(FIELDS)}"
        raise DataError(what, remedy=remedy, location=location)
    for field in FIELDS:
        value = content[field]
        if not isinstance(value, str) and not (field == "output" and value is None):
            raise DataError(f"{field!r} is {value!r:.60}, but must be a string", remedy=remedy, location=location)
    if not content["input"].strip():
        raise DataError("'input' has no text", remedy=remedy, location=location)
    output = content["output"]
    return Row(content["id"], content["pid"], content["input"], output if output and output.strip() else None, location)


@contextmanager
def _opened(folder: Path, task: str, split: str) -> Iterator[tuple[BinaryIO, str]]:
    """Yield the stream of a split and its name for messages."""
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
                remedy=f"Download it: python tools/download_data.py --dataset tau/scrolls --include {packed.name} "
                f"--output {folder}",
                location=folder,
            )
    except KeyError as error:
        raise DataError(
            f"the zip file has no {member}", remedy="Use another split, or download it again", location=packed
        ) from error
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        what = f"the file cannot be read: {error}"
        raise DataError(what, remedy="Download it again", location=plain if plain.exists() else packed) from error
