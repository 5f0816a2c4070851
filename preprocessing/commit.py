"""Publish finished ranges as dataset folders: move and renumber their shards, then write the manifest.

Every step can be interrupted and repeated: a shard that was moved is found at its new path.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bipe.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    WORK_FOLDER,
    Manifest,
    PromptAnswerRecord,
    ShardRecord,
    TokenizerRecord,
)
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.shard import choose_dtype
from megatron_bipe.data.shard_layout import SUFFIXES, shard_path
from megatron_bipe.data.tokenizer import COMPANIONS, Tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.io import PARTIAL_SUFFIX, fsync_path
from preprocessing.destinations import Destination
from preprocessing.work_dir import CLEARED_NAME, PUBLISHED_NAME, RangeRecord, WorkFolder

SHARD_PREFIX = "tokens"
RESERVED = (TOKENIZER_FOLDER, WORK_FOLDER, MANIFEST_NAME)  # names that no dataset folder may have
OWN_FILE = re.compile(rf"({SHARD_PREFIX}-\d+\.(bin|idx|seg)|{re.escape(MANIFEST_NAME)})({re.escape(PARTIAL_SUFFIX)})?")
LEVELS = 2  # levels of dataset folders below the output: split and partition


@dataclass(frozen=True)
class Contents:
    """Tokenizer, segment rule and source, common to the datasets of one run."""

    tokenizer: Tokenizer
    rule: SegmentRule
    source: dict[str, Any]  # recorded in the manifests
    examples: PromptAnswerRecord | None = None  # None: the documents are text


def publish(work: WorkFolder, records: Sequence[RangeRecord], contents: Contents) -> dict[Path, Manifest]:
    """Turn the shards of all ranges into datasets, and remove the work folder.

    Returns:
        Manifests by folder, in the order of the datasets' first documents.
    """
    if not work.has(CLEARED_NAME):
        clear_output(work.output)
        work.mark(CLEARED_NAME)
    shards: dict[Destination, list[tuple[Path, ShardRecord]]] = {}
    for number, record in enumerate(records):
        for entry in record.shards:
            shards.setdefault(entry.destination, []).append((work.range_folder(number), entry.shard))
    made = {
        folder: publish_dataset(folder, shards[destination], contents, destination)
        for destination, folder in dataset_folders(work.output, list(shards)).items()
    }
    for folder in {work.output, *(folder.parent for folder in made)}:
        fsync_path(folder)
    work.mark(PUBLISHED_NAME)
    work.remove()
    return made


def finish_publishing(work: WorkFolder) -> dict[Path, Manifest]:
    """Remove the work folder of a complete output, and return the manifests by folder."""
    work.remove()
    folders = [folder for folder in _dataset_folders_in(work.output, LEVELS) if (folder / MANIFEST_NAME).exists()]
    return {folder: Manifest.load(folder) for folder in folders}


def publish_dataset(
    folder: Path, shards: list[tuple[Path, ShardRecord]], contents: Contents, destination: Destination
) -> Manifest:
    """Make a folder a dataset by moving shards into it, each given by its folder on the same disk and its record."""
    folder.mkdir(parents=True, exist_ok=True)
    renamed = []
    for number, (origin, record) in enumerate(shards):
        name = f"{SHARD_PREFIX}-{number:05d}"
        for suffix in SUFFIXES:
            _move(shard_path(origin, record.name, suffix), shard_path(folder, name, suffix))
        renamed.append(record.model_copy(update={"name": name}))
    fsync_path(folder)
    tokenizer = contents.tokenizer
    tokenizer.copy_to(folder / TOKENIZER_FOLDER)
    for path in (*(folder / TOKENIZER_FOLDER).iterdir(), folder / TOKENIZER_FOLDER):
        fsync_path(path)
    chosen = {key: value for key, value in destination._asdict().items() if value}
    manifest = Manifest(
        tokenizer=TokenizerRecord(
            name=tokenizer.name,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            special_ids=tokenizer.special_ids,
        ),
        rule=contents.rule,
        dtype="uint16" if choose_dtype(tokenizer.vocab_size).itemsize == 2 else "int32",
        shards=tuple(renamed),
        source=contents.source | chosen,
        examples=contents.examples,
    )
    manifest.save(folder)
    return manifest


def _move(origin: Path, target: Path) -> None:
    try:
        origin.replace(target)
    except FileNotFoundError as error:
        if not target.exists():  # otherwise an earlier attempt moved it
            raise DataError(
                "A finished shard is missing from the unfinished output",
                remedy=f"Remove the folder {WORK_FOLDER!r}, and run the same command again with --overwrite",
                location=origin,
            ) from error


def dataset_folders(output: Path, destinations: Sequence[Destination]) -> dict[Destination, Path]:
    """Return each dataset's folder: the output itself, or one below it for each split, partition, or both."""
    slugs: dict[str, str] = {}
    for value in dict.fromkeys(destination.partition for destination in destinations if destination.partition):
        slugs[value] = partition_slug(value, {*RESERVED, *slugs.values()})
    return {found: output / found.split / slugs.get(found.partition, "") for found in destinations}


def partition_slug(value: str, taken: set[str]) -> str:
    """Return a folder name for a partition's value: "Gutenberg (PG-19)" becomes "gutenberg-pg-19".

    It is lower case because some file systems ignore case; each sequence of characters outside a-z, 0-9, "." and "_"
    becomes a hyphen. A value that leaves nothing, or whose name is taken, gets eight digits of its SHA-256.
    """
    slug = re.sub(r"[^a-z0-9._]+", "-", value.lower()).strip("-.")[:100]
    if slug and slug not in {*taken, *RESERVED}:
        return slug
    return f"{slug or 'partition'}-{hashlib.sha256(value.encode()).hexdigest()[:8]}"


def has_output(folder: Path) -> bool:
    """Return True if the folder holds any part of a dataset, finished or not."""
    return any(path.name != WORK_FOLDER for path in folder.iterdir())


def require_own(folder: Path) -> None:
    """Raise `DataError` if the output is a file, or holds a path that this tool did not write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError("The output must be a folder, but this is a file", remedy="Name another", location=folder)
    foreign = next(_foreign(folder, LEVELS), None)
    if foreign is not None:
        raise DataError(
            f"The output folder holds a path that is not part of a dataset: {foreign.relative_to(folder)}",
            remedy="Name another folder, or move it away",
            location=folder,
        )


def clear_output(folder: Path) -> None:
    """Remove all datasets, each manifest first, so that a partly removed dataset never looks finished."""
    for part in _dataset_folders_in(folder, LEVELS):
        (part / MANIFEST_NAME).unlink(missing_ok=True)
        for path in list(part.iterdir()):
            if OWN_FILE.fullmatch(path.name):
                path.unlink()
        shutil.rmtree(part / TOKENIZER_FOLDER, ignore_errors=True)
        if part != folder and not any(part.iterdir()):
            part.rmdir()


def remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _foreign(folder: Path, levels: int) -> Iterator[Path]:
    """Yield the paths that this tool did not write."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.is_symlink():
            if OWN_FILE.fullmatch(path.name) is None or path.is_symlink():
                yield path
        elif path.name == TOKENIZER_FOLDER:
            yield from (file for file in path.iterdir() if file.name not in COMPANIONS)
        elif path.name == WORK_FOLDER and levels == LEVELS:
            continue
        elif levels:
            yield from _foreign(path, levels - 1)
        else:
            yield path


def _dataset_folders_in(folder: Path, levels: int) -> Iterator[Path]:
    """Yield the folders that may hold a dataset, inner ones first."""
    for path in sorted(folder.iterdir()) if levels else []:
        if path.is_dir() and path.name not in RESERVED:
            yield from _dataset_folders_in(path, levels - 1)
    yield folder
