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

from megatron_bipe.data.hub import RECEIPT_NAME, require_no_path, suggest_path
from megatron_bipe.data.manifest import DATASETS_NAME, JOB_NAME, MANIFEST_NAME, TOKENIZER_FOLDER, WORK_FOLDER
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


COMPRESSED = {"": 1.0, ".gz": 3.0, ".zst": 4.0, ".bz2": 4.0, ".xz": 4.0}  # bytes of text per byte
KINDS = {
    **{
        stem + suffix: Kind("lines", True, share)
        for stem in (".jsonl", ".json", ".ndjson")
        for suffix, share in COMPRESSED.items()
    },
    **{".txt" + suffix: Kind("text", False, share) for suffix, share in COMPRESSED.items()},
    ".parquet": Kind("parquet", True, 2.0),
    ".arrow": Kind("arrow", False, 1.0),
}
SUFFIXES = ".jsonl, .json, .ndjson, .txt (each also .gz, .zst, .bz2 or .xz), .parquet and .arrow"
HUB = Kind("hub", True, 1.0)
# Files that accompany data, and hold none.
METADATA = (
    MANIFEST_NAME, DATASETS_NAME, RECEIPT_NAME,
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
)  # fmt: skip
CACHES = "cache-"  # start of the names of tables that `Dataset.map` and `filter` leave next to their source
NAMED_SKIPPED = 3  # examples of each reason for which files are skipped
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


def kind_of(name: str) -> Kind | None:
    """Return the kind of file that a name shows, in upper or lower case; None if it is not supported."""
    return next((kind for suffix, kind in KINDS.items() if name.lower().endswith(suffix)), None)


def _inputs_of(entry: str) -> list[Input]:
    path = Path(entry)
    if path.exists() and not path.is_dir():
        return [_file_input(path)]
    search = _Search()
    if path.is_dir():
        search.add_folder(path)
    else:
        matches = [Path(name) for name in sorted(glob.glob(entry, recursive=True))]  # noqa: PTH207
        for match in matches:
            search.add(match)
        if not matches and HUB_NAME.fullmatch(entry) and kind_of(entry) is None:
            return [_hub_input(entry)]
        if not matches and not glob.has_magic(entry):
            what = "There is no such file or folder"
            raise DataError(what, remedy=f"Check the path{suggest_path(path)}", location=entry)
    search.report(entry)
    if not search.files:
        raise DataError(
            f"The input names no file of the kinds {SUFFIXES}",
            remedy="Check the path",
            location=entry,
        )
    return [_file_input(file) for file in sorted(search.files)]


def _hub_input(entry: str) -> Input:
    """Return the dataset on the Hub with this name, which looks like a path."""
    require_no_path(entry)
    log.info("%s is not a path here: looking for a dataset of this name on the Hub", entry)
    found = Input(entry, HUB, *open_hub(entry))
    log.info("%s: reading the dataset on the Hub, commit %s", entry, found.version)
    return found


class _Search:
    """Files that are found in folders or by patterns, and those that are skipped, by reason."""

    def __init__(self) -> None:
        self.files: set[Path] = set()
        self._skipped: dict[str, list[Path]] = {}
        self._saved: dict[Path, frozenset[Path] | None] = {}  # files of saved datasets, by folder

    def add(self, path: Path) -> None:
        """Add the match of a pattern: a file, or a folder with all in it."""
        if path.is_dir() and path.is_symlink():
            _warn_of_link(path)
        elif path.is_dir():
            self.add_folder(path)
        else:
            self._add_file(path)

    def add_folder(self, folder: Path) -> None:
        for name, folders, files in os.walk(folder, onerror=_refuse):
            parent = Path(name)
            self._saved_in(parent)  # refuses a dataset saved with several splits
            for inner in sorted(folders):
                path = parent / inner
                if path.is_symlink():
                    _warn_of_link(path)
                elif inner.startswith("."):
                    self._skip(path, "hidden")
                else:
                    continue
                folders.remove(inner)
            for file in files:
                self._add_file(parent / file)

    def report(self, entry: str) -> None:
        """Log what was skipped."""
        reasons = []
        for reason, paths in sorted(self._skipped.items()):
            names = sorted({path.name for path in paths})
            more = ", ..." if len(names) > NAMED_SKIPPED else ""
            reasons.append(f"{len(set(paths))} {reason} ({', '.join(names[:NAMED_SKIPPED])}{more})")
        if reasons:
            log.warning("%s: files that are not read: %s", entry, "; ".join(reasons))

    def _add_file(self, path: Path) -> None:
        reason = self._reason_against(path)
        if reason is None:
            self.files.add(path)
        elif reason:
            self._skip(path, reason)

    def _reason_against(self, path: Path) -> str | None:
        """Return the reason for which a file is skipped, "" for one that describes a saved dataset; else None."""
        name, saved = path.name, self._saved_in(path.parent)
        if name.startswith("."):
            return "hidden"
        if not path.is_file():
            return "broken links"
        if saved is not None:
            return None if path in saved else "" if name in METADATA else "not part of the saved dataset"
        if any(folder.name == WORK_FOLDER and (folder / JOB_NAME).is_file() for folder in list(path.parents)[:2]):
            return "of an unfinished dataset"
        if name in METADATA or (path.parent.name == TOKENIZER_FOLDER and name in COMPANIONS):
            return "metadata"
        if kind_of(name) is None:
            suffix = "".join(path.suffixes[-2:] if path.suffix.lower() in COMPRESSED else path.suffixes[-1:])
            return f"of kind {suffix.lower()}" if suffix else "without a suffix"
        return "caches of `datasets`" if name.startswith(CACHES) and name.endswith(".arrow") else None

    def _skip(self, path: Path, reason: str) -> None:
        self._skipped.setdefault(reason, []).append(path)

    def _saved_in(self, folder: Path) -> frozenset[Path] | None:
        """Return the files of the dataset that is saved in a folder; None if there is none."""
        if folder not in self._saved:
            self._saved[folder] = frozenset(saved_files(folder)) if is_saved_dataset(folder) else None
        return self._saved[folder]


def _warn_of_link(path: Path) -> None:
    log.warning("%s is a link to a folder and is not searched; name it as an input to read it", path)


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
    kind = kind_of(file.name)
    if kind is None:
        raise DataError(
            f"Files of this kind are not supported; the kinds are {SUFFIXES}",
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
