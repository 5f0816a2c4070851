"""What there is to read, and its division into ranges that depend on nothing but the inputs."""

import glob
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_bipe.data.manifest import TOKENIZER_FOLDER
from megatron_bipe.data.tokenizer import COMPANIONS
from megatron_bipe.errors import DataError
from preprocessing.readers.tables import is_saved_dataset, open_hub, saved_files


class Kind(NamedTuple):
    """How a kind of input is read and shared out."""

    reader: str  # one of `documents.READERS`
    is_divisible: bool  # may be read from any byte on (or any part, on the Hub)
    text_share: float  # bytes of text for a byte on disk, about: ranges shall mean alike amounts of work


KINDS = {
    ".jsonl": Kind("lines", True, 1.0),
    ".jsonl.zst": Kind("lines", True, 4.0),
    ".jsonl.gz": Kind("lines", True, 3.0),
    ".txt": Kind("text", False, 1.0),
    ".parquet": Kind("parquet", True, 2.0),
    ".arrow": Kind("arrow", False, 1.0),
}
HUB = Kind("hub", True, 1.0)
SUFFIXES = tuple(suffix for suffix in KINDS if suffix != ".arrow")  # that alone comes with a folder around it
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")

RANGE_TEXT_BYTES = 1 << 30  # at most: half a minute's work, and a shard of half a gigabyte
LEAST_RANGE_TEXT_BYTES = 1 << 23
RANGES = 256  # of an input between those bounds: enough for as many workers
BYTES_A_TOKEN = 4  # of text, about

log = logging.getLogger(__name__)


class Input(NamedTuple):
    """A file, or a dataset on the Hub."""

    name: str
    kind: Kind
    size: int  # bytes on disk; parts of a Hub dataset
    version: str  # time of modification, or commit: what another content has another of


class Piece(NamedTuple):
    """What begins in [start, stop) of an input: bytes on disk, or parts."""

    input: Input
    start: int
    stop: int


def find_inputs(inputs: Sequence[str]) -> list[Input]:
    """What is named by paths, folders (searched through), glob patterns and Hub names, in the order given, each once.

    Raises:
        DataError: an input that names nothing, or a file of a kind that is not read.
    """
    found: dict[str, Input] = {}
    for entry in inputs:
        for item in _inputs_of(entry):
            what = item.name if item.kind == HUB else str(Path(item.name).resolve())
            if what in found:
                log.warning("%s is named twice among the inputs; it is read once", item.name)
            found.setdefault(what, item)
    return list(found.values())


def _inputs_of(entry: str) -> list[Input]:
    path = Path(entry)
    if path.is_dir():
        if is_saved_dataset(path):
            return [_file_input(file) for file in saved_files(path)]
        files = sorted(_files_below(path))
    elif path.exists():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(entry, recursive=True) if Path(name).is_file())  # noqa: PTH207
        if not files and HUB_NAME.fullmatch(entry) and not entry.endswith(SUFFIXES):
            return [Input(entry, HUB, *open_hub(entry))]
    if not files:
        raise DataError(
            f"The input names no file of the kinds {', '.join(SUFFIXES)}", remedy="Check the path", location=entry
        )
    return [_file_input(file) for file in files]


def _files_below(folder: Path) -> Iterator[Path]:
    """Files of the kinds that are read, except what belongs to the tokenizer of a dataset, such as `merges.txt`."""
    for name, folders, files in os.walk(folder, onerror=_refuse):
        place = Path(name)
        for linked in filter(Path.is_symlink, (place / inner for inner in folders)):
            log.warning("%s is a link to a folder and is not searched; name it as an input to have it read", linked)
        not_texts = COMPANIONS if place.name == TOKENIZER_FOLDER else ()
        for file in files:
            if file.endswith(SUFFIXES) and file not in not_texts and (place / file).is_file():
                yield place / file


def _refuse(error: OSError) -> None:
    raise DataError(
        f"The folder cannot be searched: {error.strerror}",
        remedy="Mend its permissions, or name the files to read",
        location=error.filename,
    ) from error


def require_unchanged(item: Input) -> None:
    """Refuse a file that has another size or date than when it was found.

    Raises:
        DataError: it has.
    """
    if item.kind.reader != HUB.reader and _file_input(Path(item.name)) != item:
        raise DataError(
            "The file was changed after the run had begun",
            remedy="Run again with --overwrite, and leave the inputs alone until the end",
            location=item.name,
        )


def _file_input(file: Path) -> Input:
    kind = next((KINDS[suffix] for suffix in KINDS if file.name.endswith(suffix)), None)
    if kind is None:
        raise DataError(
            f"Files of this kind are not read; the kinds are {', '.join(SUFFIXES)}",
            remedy="Convert or rename the file",
            location=file,
        )
    status = file.stat()
    return Input(str(file), kind, status.st_size, str(status.st_mtime_ns))


def plan_ranges(inputs: Sequence[Input], shard_tokens: int) -> list[list[Piece]]:
    """Divide the inputs, in order, into ranges of about equal work: parts of large files, runs of small ones.

    Args:
        inputs: their sizes alone decide.
        shard_tokens: a range is not to be much more than a shard, so that little is lost when a run is killed.
    """
    total = sum(_text_bytes(item) for item in inputs)
    target = min(max(total / RANGES, LEAST_RANGE_TEXT_BYTES), RANGE_TEXT_BYTES)
    target = max(min(target, BYTES_A_TOKEN * shard_tokens), LEAST_RANGE_TEXT_BYTES / 8)
    ranges: list[list[Piece]] = []
    group: list[Piece] = []
    grouped = 0.0
    for piece, text_bytes in _pieces(inputs, target):
        if group and grouped + text_bytes > target:
            ranges.append(group)
            group, grouped = [], 0.0
        group.append(piece)
        grouped += text_bytes
    return [*ranges, group] if group else ranges


def _pieces(inputs: Sequence[Input], target: float) -> Iterator[tuple[Piece, float]]:
    """Whole inputs, or equal parts of at most `target` bytes of text; and how much text each has, about."""
    for item in inputs:
        text_bytes = _text_bytes(item)
        count = max(1, min(-int(-text_bytes // target), item.size)) if item.kind.is_divisible else 1
        bounds = [item.size * number // count for number in range(count + 1)]
        for start, stop in itertools.pairwise(bounds):
            yield Piece(item, start, stop), text_bytes / count


def _text_bytes(item: Input) -> float:
    """Of an input, about; nothing is known of a Hub dataset, whose parts become a range each."""
    return item.size * (RANGE_TEXT_BYTES if item.kind is HUB else item.kind.text_share)
