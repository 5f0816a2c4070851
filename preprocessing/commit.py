"""Publish finished ranges as dataset folders: move and renumber their shards, then write the manifest.

Every step can be interrupted and repeated: a shard that was moved is found at its new path.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from megatron_bipe.data.dataset import dataset_files, foreign_paths
from megatron_bipe.data.manifest import (
    DATASETS_NAME,
    JOB_NAME,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    WORK_FOLDER,
    Manifest,
    PromptAnswerRecord,
    Record,
    Sha256,
    ShardRecord,
)
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.shard import choose_dtype
from megatron_bipe.data.shard_layout import SUFFIXES, dtype_name, shard_name, shard_path
from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.io import fsync_path, partial_path, write_atomically
from preprocessing.destinations import Destination
from preprocessing.work_dir import CLEARED_NAME, FILES_NAME, PUBLISHED_NAME, RangeRecord, WorkFolder

RESERVED = (TOKENIZER_FOLDER, WORK_FOLDER, MANIFEST_NAME, DATASETS_NAME)  # names that no dataset folder may have


@dataclass(frozen=True)
class Contents:
    """Tokenizer, segment rule and source, common to the datasets of one run."""

    tokenizer: Tokenizer
    rule: SegmentRule
    source: dict[str, Any]  # recorded in the manifests
    examples: PromptAnswerRecord | None = None  # None: the documents are text


class OutputRecord(Record):
    """Content of `datasets.json`: the datasets that one job made in folders below its output."""

    datasets: dict[Annotated[str, Field(pattern=r"^(\w[\w.-]*/)?\w[\w.-]*$")], Sha256]
    """Fingerprint of each dataset's manifest, by folder relative to the output."""


def publish(work: WorkFolder, records: Sequence[RangeRecord], contents: Contents) -> dict[Path, Manifest]:
    """Turn the shards of all ranges into datasets, and remove the work folder.

    Returns:
        Manifests by folder, in the order of the datasets' first documents.
    """
    require_own(work)  # something may have been added since the start
    if not work.has(CLEARED_NAME):
        clear_output(work)
        work.mark(CLEARED_NAME)
    shards: dict[Destination, list[tuple[Path, ShardRecord]]] = {}
    for number, record in enumerate(records):
        for entry in record.shards:
            shards.setdefault(entry.destination, []).append((work.range_folder(number), entry.shard))
    folders = dataset_folders(work.output, list(shards))
    for destination, folder in folders.items():
        _require_complete(folder, shards[destination])  # before the first one is moved
    record_files(work, {folder: len(shards[destination]) for destination, folder in folders.items()})
    made = {
        folder: publish_dataset(folder, shards[destination], contents, destination)
        for destination, folder in folders.items()
    }
    if work.output not in made:
        below = {folder.relative_to(work.output).as_posix(): manifest.fingerprint for folder, manifest in made.items()}
        write_atomically(work.output / DATASETS_NAME, OutputRecord(datasets=below).model_dump_json(indent=1).encode())
    for folder in {work.output, *(folder.parent for folder in made)}:
        fsync_path(folder)
    work.mark(PUBLISHED_NAME)
    work.remove()
    return made


def finish_publishing(work: WorkFolder) -> dict[Path, Manifest]:
    """Remove the work folder of a complete output, and return the manifests by folder."""
    work.remove()
    return recorded_datasets(work.output)


def publish_dataset(
    folder: Path, shards: list[tuple[Path, ShardRecord]], contents: Contents, destination: Destination
) -> Manifest:
    """Make a folder a dataset by moving shards into it, each given by its folder on the same disk and its record."""
    folder.mkdir(parents=True, exist_ok=True)
    renamed = []
    for number, (origin, record) in enumerate(shards):
        name = shard_name(number)
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
        tokenizer=tokenizer.record,
        rule=contents.rule,
        dtype=dtype_name(choose_dtype(tokenizer.vocab_size)),
        shards=tuple(renamed),
        source=contents.source | {"special_in_text": tokenizer.special_in_text} | chosen,
        examples=contents.examples,
    )
    manifest.save(folder)
    return manifest


def _require_complete(folder: Path, shards: list[tuple[Path, ShardRecord]]) -> None:
    for number, (origin, record) in enumerate(shards):
        for suffix in SUFFIXES:
            path = shard_path(origin, record.name, suffix)
            if not path.exists() and not shard_path(folder, shard_name(number), suffix).exists():
                raise DataError(
                    "A finished shard is missing from the unfinished output",
                    remedy=f"Remove the folder {WORK_FOLDER!r}, and run the same command again with --overwrite",
                    location=path,
                )


def _move(origin: Path, target: Path) -> None:
    with suppress(FileNotFoundError):  # an earlier attempt moved it
        origin.replace(target)


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


def recorded_datasets(output: Path) -> dict[Path, Manifest]:
    """Return the manifests, by folder, of the datasets that an output's own records name; others are not looked for.

    A folder counts only if its manifest is still the one on record. A damaged record names nothing.
    """
    found: dict[Path, Manifest] = {}
    with suppress(DataError):
        found[output] = Manifest.load(output)
    below: Mapping[str, str] = {}
    with suppress(OSError, ValidationError):
        below = OutputRecord.model_validate_json((output / DATASETS_NAME).read_bytes()).datasets
    for name, fingerprint in below.items():
        with suppress(DataError):
            manifest = Manifest.load(output / name)
            if manifest.fingerprint == fingerprint:
                found[output / name] = manifest
    return found


def recorded_files(work: WorkFolder) -> set[str]:
    """Return the files, relative to the output, that a record there lists; only these are ever deleted or replaced.

    While a job is unfinished, its own record counts: a dataset that was added meanwhile is not the job's.
    """
    if work.has(JOB_NAME) and work.has(FILES_NAME):
        return work.load_files()
    datasets = recorded_datasets(work.output)
    shard_names = {folder: [shard.name for shard in manifest.shards] for folder, manifest in datasets.items()}
    files = _output_files(work.output, shard_names, has_record=bool(set(datasets) - {work.output}))
    return files | work.load_files()


def record_files(work: WorkFolder, num_shards: Mapping[Path, int]) -> None:
    """Record the files that publication is going to write, given the number of shards of each dataset's folder."""
    shard_names = {folder: map(shard_name, range(count)) for folder, count in num_shards.items()}
    work.save_files(_output_files(work.output, shard_names, has_record=True))


def _output_files(output: Path, shard_names: Mapping[Path, Iterable[str]], *, has_record: bool) -> set[str]:
    """Return the files of datasets, given the names of their shards by folder, and of the record of these datasets."""
    files = {path for folder, names in shard_names.items() for path in dataset_files(folder, names)}
    files |= {output / DATASETS_NAME, partial_path(output / DATASETS_NAME)} if has_record else set()
    return {path.relative_to(output).as_posix() for path in files}


def require_own(work: WorkFolder) -> None:
    """Raise `DataError` if the output is a file, or holds a path that no record of this tool lists."""
    folder = work.output
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError("The output must be a folder, but this is a file", remedy="Name another", location=folder)
    own = {folder / name for name in recorded_files(work)}
    others = (path for path in foreign_paths(folder, own) if not path.is_relative_to(work.path))
    foreign = next(itertools.chain(work.foreign_paths(), others), None)
    if foreign is not None:
        raise DataError(
            f"The output folder holds a path that no record of this tool lists: {foreign.relative_to(folder)}",
            remedy="Name another folder, or move it away",
            location=folder,
        )


def clear_output(work: WorkFolder) -> None:
    """Delete the recorded files, manifests first, so that a partly removed dataset never looks finished."""
    files = {work.output / name for name in work.load_files()}
    for path in sorted(files, key=lambda path: (path.name != MANIFEST_NAME, path)):
        path.unlink(missing_ok=True)
    for folder in sorted({parent for path in files for parent in path.parents}, reverse=True):
        if folder.is_relative_to(work.output) and folder != work.output:
            remove_if_empty(folder)


def remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
