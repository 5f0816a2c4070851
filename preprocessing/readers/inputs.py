"""Find the inputs, and divide them into ranges that depend on nothing but the inputs."""

import glob
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_bipe.data.manifest import TOKENIZER_FOLDER
from megatron_bipe.data.tokenizer import COMPANIONS
from megatron_bipe.errors import DataError
from megatron_bipe.io import check_inner_name
from preprocessing.readers.hub_dataset import open_hub
from preprocessing.readers.lines import reading


class Kind(NamedTuple):
    """Kind of input: its reader, and how it is divided into ranges."""

    reader: Literal["lines", "text", "parquet", "arrow", "hub"]
    is_divisible: bool  # can be read from any byte (or any part, on the Hub)
    text_share: float  # approximate bytes of text per byte on disk, so that ranges are equal amounts of work


KINDS = {
    ".jsonl": Kind("lines", True, 1.0),
    ".jsonl.zst": Kind("lines", True, 4.0),
    ".jsonl.gz": Kind("lines", True, 3.0),
    ".txt": Kind("text", False, 1.0),
    ".parquet": Kind("parquet", True, 2.0),
    ".arrow": Kind("arrow", False, 1.0),
}
HUB = Kind("hub", True, 1.0)
SUFFIXES = tuple(suffix for suffix in KINDS if suffix != ".arrow")  # which is read only as part of a saved folder
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")

RANGE_TEXT_BYTES = 1 << 30  # at most: half a minute of work, and a shard of half a gigabyte
LEAST_RANGE_TEXT_BYTES = 1 << 23
RANGES = 256  # of an input between those bounds: enough for as many workers
BYTES_A_TOKEN = 4  # of text, approximately

log = logging.getLogger(__name__)


class Input(NamedTuple):
    """File, or dataset on the Hub."""

    name: str
    kind: Kind
    size: int  # bytes on disk; parts of a Hub dataset
    version: str  # modification time, or commit: changes with the content


class Piece(NamedTuple):
    """Content that begins in [start, stop) of an input: bytes on disk, or parts."""

    input: Input
    start: int
    stop: int


def find_inputs(inputs: Sequence[str]) -> list[Input]:
    """Return the inputs named by paths, folders (with subfolders), glob patterns and Hub names, in order, each once.

    Raises:
        DataError: an entry names nothing, or a file of an unsupported kind.
    """
    found: dict[str, Input] = {}
    for entry in inputs:
        for item in _inputs_of(entry):
            key = item.name if item.kind == HUB else str(Path(item.name).resolve())
            if key in found:
                log.warning("%s is named twice among the inputs; it is read once", item.name)
            found.setdefault(key, item)
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


def is_saved_dataset(folder: Path) -> bool:
    """Return True if `datasets` saved a dataset, or one with several splits, in this folder."""
    marks = ({"dataset_dict.json"}, {"state.json", "dataset_info.json"})
    return any(all((folder / name).is_file() for name in names) for names in marks)


def saved_files(folder: Path) -> list[Path]:
    """Return the `.arrow` files of a folder made by `Dataset.save_to_disk`, in order.

    Raises:
        DataError: the folder holds several splits, or is damaged or incomplete.
    """
    listing = folder / "state.json"
    if not listing.exists():
        splits = sorted(state.parent for state in folder.glob("*/state.json"))
        raise DataError(
            f"This is a dataset saved with its splits: {', '.join(split.name for split in splits) or 'none is here'}",
            remedy=f"Name the folder of one split as the input, such as {splits[0] if splits else folder / 'train'}",
            location=folder,
        )
    try:
        with reading(listing):
            entries = json.loads(listing.read_bytes())["_data_files"]
            files = [folder / check_inner_name(entry["filename"]) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"This does not list files as `Dataset.save_to_disk` does ({type(error).__name__}: {error})",
            remedy="Copy or save the dataset again",
            location=listing,
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(
            f"The saved dataset lacks {', '.join(missing[:3]) or 'any file'}{', ...' if len(missing) > 3 else ''}",
            remedy="Copy or save the dataset again",
            location=folder,
        )
    return files


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files of supported kinds, except those of a dataset's tokenizer, such as `merges.txt`."""
    for name, folders, files in os.walk(folder, onerror=_refuse):
        parent = Path(name)
        for linked in filter(Path.is_symlink, (parent / inner for inner in folders)):
            log.warning("%s is a link to a folder and is not searched; name it as an input to read it", linked)
        not_texts = COMPANIONS if parent.name == TOKENIZER_FOLDER else ()
        for file in files:
            if file.endswith(SUFFIXES) and file not in not_texts and (parent / file).is_file():
                yield parent / file


def _refuse(error: OSError) -> None:
    raise DataError(
        f"The folder cannot be searched: {error.strerror}",
        remedy="Fix its permissions, or name the files to read",
        location=error.filename,
    ) from error


def require_unchanged(item: Input) -> None:
    """Raise `DataError` if a file's size or date has changed since it was found."""
    if item.kind.reader != HUB.reader and _file_input(Path(item.name)) != item:
        raise DataError(
            "The file was changed after the run began",
            remedy="Run again with --overwrite, and do not change the inputs until it ends",
            location=item.name,
        )


def _file_input(file: Path) -> Input:
    kind = next((KINDS[suffix] for suffix in KINDS if file.name.endswith(suffix)), None)
    if kind is None:
        raise DataError(
            f"Files of this kind are not supported; the kinds are {', '.join(SUFFIXES)}",
            remedy="Convert or rename the file",
            location=file,
        )
    status = file.stat()
    return Input(str(file), kind, status.st_size, str(status.st_mtime_ns))


def plan_ranges(inputs: Sequence[Input], shard_tokens: int) -> list[list[Piece]]:
    """Divide the inputs, in order, into ranges of about equal work: parts of large files, groups of small ones.

    A range is at most about one shard, so that little is lost when a run is killed.
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
    """Yield complete inputs, or equal parts of at most `target` bytes of text, each with its approximate text size."""
    for item in inputs:
        text_bytes = _text_bytes(item)
        count = max(1, min(-int(-text_bytes // target), item.size)) if item.kind.is_divisible else 1
        bounds = [item.size * number // count for number in range(count + 1)]
        for start, stop in itertools.pairwise(bounds):
            yield Piece(item, start, stop), text_bytes / count


def _text_bytes(item: Input) -> float:
    """Return the approximate text size; that of a Hub dataset is unknown, and each of its parts becomes a range."""
    return item.size * (RANGE_TEXT_BYTES if item.kind is HUB else item.kind.text_share)
