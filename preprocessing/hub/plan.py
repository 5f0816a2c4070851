"""What a download would do: the chosen files of a repository, and what of them is in the folder already."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.utils import filter_repo_objects
from tqdm import tqdm

from megatron_bipe.errors import DataError
from megatron_bipe.io import partial_path
from preprocessing.hub.download_manifest import Receipt, is_own
from preprocessing.hub.transfer import HubFile, Snapshot, list_snapshot


@dataclass(frozen=True)
class DownloadOptions:
    """What `tools/download_data.py` is asked to do; the fields are its options."""

    output: Path
    repo: str
    include: Sequence[str] = ()  # patterns of paths in the repository; none: all
    revision: str | None = None  # None: the commit that the folder holds, else the main branch
    workers: int = 4
    verify: bool = False
    overwrite: bool = False
    endpoint: str | None = None


class State(StrEnum):
    """What is known of a file before its content is looked at."""

    WHOLE = "whole"  # the receipt says so
    UNCHECKED = "to check"  # of the right size
    DAMAGED = "damaged"  # of a wrong size
    PARTIAL = "to go on with"
    MISSING = "to fetch"


class Item(NamedTuple):
    """A file of the plan."""

    file: HubFile
    state: State
    fetch_bytes: int  # 0 if there is a file, to be checked or not


class Plan(NamedTuple):
    """What a download would do."""

    snapshot: Snapshot  # with the chosen files only
    items: tuple[Item, ...]
    free_bytes: int  # on the disk of the output folder

    @property
    def fetch_bytes(self) -> int:
        """To come over the network, if what is to be checked is whole."""
        return sum(item.fetch_bytes for item in self.items)

    def require_space(self) -> None:
        """Refuse what the disk cannot hold."""
        if self.fetch_bytes > self.free_bytes:
            raise DataError(
                f"{in_bytes(self.fetch_bytes)} are to be fetched, and the disk has {in_bytes(self.free_bytes)} free",
                remedy="Make room, choose fewer files with --include, or name a folder on another disk",
                location="--output",
            )


def make_plan(options: DownloadOptions) -> Plan:
    """What `download` would do; reads no content and writes nothing.

    Raises:
        DataError: as `list_snapshot`; a pattern that no file matches, or a folder that holds another download.
    """
    snapshot = find_snapshot(options)
    return survey(options, snapshot, receipt_for(options.output, snapshot))


def find_snapshot(options: DownloadOptions) -> Snapshot:
    """The chosen files; of the commit that the folder holds already, if no other is asked for."""
    if options.output.exists() and not options.output.is_dir():
        raise DataError(
            "The output must be a folder, and this is a file", remedy="Name another", location=options.output
        )
    held = Receipt.load(options.output)
    commit = held.commit if held is not None and held.repo == options.repo else None
    snapshot = list_snapshot(options.repo, options.revision or commit, options.endpoint)
    paths = [file.path for file in snapshot.files if not is_own(file.path)]
    for pattern in options.include:
        if not any(filter_repo_objects(paths, allow_patterns=pattern)):
            raise DataError(
                f"No file of {snapshot.repo} matches {pattern!r}; there are {len(paths)}, such as {some_of(paths)}",
                remedy="Give patterns of whole paths, in quotes, e.g. 'train/0*'",
                location="--include",
            )
    chosen = set(filter_repo_objects(paths, allow_patterns=list(options.include) or None))
    return snapshot._replace(files=tuple(file for file in snapshot.files if file.path in chosen))


def receipt_for(folder: Path, snapshot: Snapshot) -> Receipt:
    """The folder's receipt, or a new one; one folder holds one commit."""
    receipt = Receipt.load(folder) or Receipt(repo=snapshot.repo, commit=snapshot.commit)
    if (receipt.repo, receipt.commit) != (snapshot.repo, snapshot.commit):
        raise DataError(
            f"The folder holds {receipt.repo} at commit {receipt.commit}, and {snapshot.repo} at commit "
            f"{snapshot.commit} is asked for",
            remedy="Name another folder, or ask for what this one holds",
            location=folder,
        )
    return receipt


def survey(options: DownloadOptions, snapshot: Snapshot, receipt: Receipt) -> Plan:
    """Compare the folder with the chosen files, by receipt, names and sizes."""
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
    known = not options.verify and receipt.vouches_for(file, path)
    return Item(file, State.WHOLE if known else State.UNCHECKED, 0)


def rest_bytes(path: Path, file: HubFile) -> int:
    """What a file's part on disk lacks."""
    part = partial_path(path)
    there = part.stat().st_size if part.exists() else 0
    return file.size_bytes - there if there <= file.size_bytes else file.size_bytes


def in_bytes(size_bytes: int) -> str:
    """A size as a person reads it: 353GB."""
    return tqdm.format_sizeof(size_bytes, suffix="B")


def some_of(paths: Sequence[str]) -> str:
    """The first few, for a message."""
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
