"""Plan of a download: known datasets, the selected files of a repository, and their state in the folder.

The folder's receipt records its repository and commit, and the files that were verified. A file that the receipt names,
with the same size and modification time, is not read again.
"""

import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.utils import filter_repo_objects
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from megatron_bipe.data.hub import RECEIPT_NAME
from megatron_bipe.data.manifest import InnerName
from megatron_bipe.errors import DataError
from megatron_bipe.io import PARTIAL_SUFFIX, partial_path, unreadable_error, write_atomically
from preprocessing.hub.transfer import HubFile, Snapshot, disk_errors, list_snapshot

LOCK_NAME = ".download.lock"


def is_own(path: str) -> bool:
    """Return True if a path in the folder is reserved for the download; no file of the repository may have it."""
    return path in (RECEIPT_NAME, LOCK_NAME) or path.endswith(PARTIAL_SUFFIX)


class Entry(BaseModel):
    """State of a file on disk when its content was verified."""

    checksum: str
    size_bytes: int
    modified_ns: int


class Receipt(BaseModel):
    """Contents of a folder: one repository at one commit."""

    repo: str
    commit: str
    files: dict[InnerName, Entry] = {}

    @classmethod
    def load(cls, folder: Path) -> "Receipt | None":
        """Read a folder's receipt; return None if it has none.

        Raises:
            DataError: the receipt is unreadable or damaged.
        """
        path = folder / RECEIPT_NAME
        try:
            return cls.model_validate_json(path.read_bytes(), strict=True)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise unreadable_error(path, error) from error
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise DataError(
                f"The receipt is damaged: {problem['msg']} at {'.'.join(map(str, problem['loc'])) or 'the start'}",
                remedy="Remove it: the files in this folder are then checked again, and kept if they are complete",
                location=path,
            ) from error

    def save(self, folder: Path) -> None:
        """Write the receipt to its folder atomically."""
        with disk_errors(folder / RECEIPT_NAME):
            write_atomically(folder / RECEIPT_NAME, self.model_dump_json(indent=2).encode())

    def add(self, file: HubFile, path: Path) -> None:
        """Record a file whose content was just verified."""
        self.files[file.path] = _entry(file, path)

    def is_verified(self, file: HubFile, path: Path) -> bool:
        """Return True if the file was verified and has not been written to since."""
        return self.files.get(file.path) == _entry(file, path)

    def mark_unverified(self, file: HubFile) -> None:
        """Mark a damaged file as not verified; it stays listed as a file of this download."""
        if file.path in self.files:
            self.files[file.path].modified_ns = 0


def _entry(file: HubFile, path: Path) -> Entry:
    status = path.stat()
    return Entry(checksum=file.checksum, size_bytes=status.st_size, modified_ns=status.st_mtime_ns)


@dataclass(frozen=True)
class DownloadOptions:
    """Options of `tools/download_data.py`."""

    output: Path
    repo: str
    include: Sequence[str] = ()  # patterns of paths in the repository; empty: all
    revision: str | None = None  # None: the commit that the folder holds, else the main branch
    workers: int = 4
    verify: bool = False
    overwrite: bool = False
    endpoint: str | None = None


class State(StrEnum):
    """State of a file before its content is read."""

    COMPLETE = "complete"  # according to the receipt
    UNCHECKED = "to check"  # has the right size
    DAMAGED = "damaged"  # has a wrong size
    PARTIAL = "to resume"
    MISSING = "to fetch"


class Item(NamedTuple):
    """File of a plan."""

    file: HubFile
    state: State
    fetch_bytes: int  # 0 if the file exists with the right size


class Plan(NamedTuple):
    """Files of a download with their states, and the free disk space."""

    snapshot: Snapshot  # of the selected files only
    items: tuple[Item, ...]
    free_bytes: int  # on the disk of the output folder

    @property
    def fetch_bytes(self) -> int:
        """Bytes to fetch if all unchecked files are complete."""
        return sum(item.fetch_bytes for item in self.items)

    def require_space(self) -> None:
        """Raise `DataError` if the disk is too small for the download."""
        if self.fetch_bytes > self.free_bytes:
            raise DataError(
                f"{format_bytes(self.fetch_bytes)} must be fetched, and {format_bytes(self.free_bytes)} are free",
                remedy="Free disk space, choose fewer files with --include, or name a folder on another disk",
                location="--output",
            )


def make_plan(options: DownloadOptions) -> Plan:
    """Return what `download` would do; read no content and write nothing.

    Raises:
        DataError: as `list_snapshot`; or no file matches a pattern, or the folder holds another download.
    """
    snapshot = find_snapshot(options)
    return survey(options, snapshot, receipt_for(options.output, snapshot))


def find_snapshot(options: DownloadOptions) -> Snapshot:
    """List the selected files, by default of the commit that the folder already holds."""
    if options.output.exists() and not options.output.is_dir():
        raise DataError(
            "The output must be a folder, but this is a file", remedy="Name another", location=options.output
        )
    held = Receipt.load(options.output)
    commit = held.commit if held is not None and held.repo == options.repo else None
    snapshot = list_snapshot(options.repo, options.revision or commit, options.endpoint)
    paths = [file.path for file in snapshot.files if not is_own(file.path)]
    for pattern in options.include:
        if not any(filter_repo_objects(paths, allow_patterns=pattern)):
            raise DataError(
                f"No file of {snapshot.repo} matches {pattern!r}; it has {len(paths)}, such as {format_paths(paths)}",
                remedy="Give patterns of complete paths, in quotes, e.g. 'train/0*'",
                location="--include",
            )
    chosen = set(filter_repo_objects(paths, allow_patterns=list(options.include) or None))
    return snapshot._replace(files=tuple(file for file in snapshot.files if file.path in chosen))


def receipt_for(folder: Path, snapshot: Snapshot) -> Receipt:
    """Return the folder's receipt, or a new one; a folder holds one commit."""
    receipt = Receipt.load(folder) or Receipt(repo=snapshot.repo, commit=snapshot.commit)
    if (receipt.repo, receipt.commit) != (snapshot.repo, snapshot.commit):
        raise DataError(
            f"The folder holds {receipt.repo} at commit {receipt.commit}, but {snapshot.repo} at commit "
            f"{snapshot.commit} is requested",
            remedy="Name another folder, or request what this one holds",
            location=folder,
        )
    return receipt


def survey(options: DownloadOptions, snapshot: Snapshot, receipt: Receipt) -> Plan:
    """Compare the folder with the selected files, by receipt, names and sizes."""
    items = tuple(_item(file, options, receipt) for file in snapshot.files)
    there = next(folder for folder in (options.output, *options.output.absolute().parents) if folder.exists())
    return Plan(snapshot, items, shutil.disk_usage(there).free)


def _item(file: HubFile, options: DownloadOptions, receipt: Receipt) -> Item:
    path = options.output / file.path
    if not path.exists():
        rest = rest_bytes(path, file)
        return Item(file, State.MISSING if rest == file.size_bytes else State.PARTIAL, rest)
    if path.is_dir():
        raise DataError("A folder has the name of a file that is to be fetched", remedy="Move it away", location=path)
    if path.stat().st_size != file.size_bytes:
        return Item(file, State.DAMAGED, rest_bytes(path, file))
    known = not options.verify and receipt.is_verified(file, path)
    return Item(file, State.COMPLETE if known else State.UNCHECKED, 0)


def rest_bytes(path: Path, file: HubFile) -> int:
    """Return the number of bytes that a file's partial download lacks."""
    part = partial_path(path)
    there = part.stat().st_size if part.exists() else 0
    return file.size_bytes - there if there <= file.size_bytes else file.size_bytes


def format_bytes(size_bytes: int) -> str:
    """Format a size for people: 353GB."""
    return tqdm.format_sizeof(size_bytes, suffix="B")


def format_paths(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")


@dataclass(frozen=True)
class Known:
    """Dataset repository on the Hub, or part of one."""

    repo: str  # OWNER/NAME
    include: tuple[str, ...] = ()  # patterns of the files to fetch; empty: all
    next_commands: tuple[tuple[str, str], ...] = ()  # file pattern, and the command for such files in `{folder}`


_PREPROCESS = "python tools/preprocess.py --tokenizer TOKENIZER --workers 8 --input {folder}/"
_PILE_REPO = "monology/pile-uncopyrighted"
_PILE_NEXT = (
    ("train/*", _PREPROCESS + "train --output data/pile"),
    ("val.jsonl.zst", _PREPROCESS + "val.jsonl.zst --output data/pile-val"),
    # The evaluation subsets of the paper become the folders gutenberg-pg-19, arxiv and github.
    ("val.jsonl.zst", _PREPROCESS + "val.jsonl.zst --output data/pile-subsets --partition-by meta.pile_set_name"),
)

KNOWN = {
    "pile": Known(_PILE_REPO, (), _PILE_NEXT),
    "pile-val": Known(_PILE_REPO, ("val.jsonl.zst",), _PILE_NEXT),
}
DEFAULT = KNOWN["pile"].repo


def find_known(name: str) -> Known:
    """Return the dataset with this short name or repository; any other name is taken as a repository."""
    return next((known for short, known in KNOWN.items() if name in (short, known.repo)), Known(name))


def next_commands(known: Known, folder: Path, files: Iterable[str]) -> list[str]:
    """Return the commands that process these files of a folder."""
    there = list(files)
    wanted = [command for pattern, command in known.next_commands if any(fnmatchcase(file, pattern) for file in there)]
    return [command.format(folder=shlex.quote(str(folder))) for command in wanted]
