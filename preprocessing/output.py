"""Where tokenized documents go: a dataset folder with its shards, tokenizer and manifest, or one per partition."""

import hashlib
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatron_bipe.data.files import PARTIAL_SUFFIX
from megatron_bipe.data.format import ShardWriter, choose_dtype
from megatron_bipe.data.manifest import MANIFEST_NAME, TOKENIZER_FOLDER, Manifest, TokenizerRecord
from megatron_bipe.data.records import ShardRecord
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.tokenizer import COMPANIONS, Tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.types import TokenizedDocument

SHARD_PREFIX = "tokens"
MAX_PARTITIONS = 1000  # each keeps a file open; a key with more values than this is hardly meant
OWN_FILE = re.compile(rf"({SHARD_PREFIX}-\d+\.(bin|idx|seg)|{re.escape(MANIFEST_NAME)})({re.escape(PARTIAL_SUFFIX)})?")


@dataclass(frozen=True)
class Contents:
    """What the datasets of one run have in common."""

    tokenizer: Tokenizer
    rule: SegmentRule
    shard_tokens: int  # a shard is closed before the document that would take it beyond this


class DatasetWriter:
    """One dataset folder: shards one after the other, then `finish` makes it a dataset."""

    def __init__(self, folder: Path, contents: Contents) -> None:
        self._folder = folder
        self._contents = contents
        self._dtype = choose_dtype(contents.tokenizer.vocab_size)
        self._shards: list[ShardRecord] = []
        self._shard: ShardWriter | None = None

    def add(self, document: TokenizedDocument) -> None:
        """Append a document, to a new shard if the open one is full."""
        shard = self._shard
        if shard is not None and shard.num_tokens + document.tokens_T.size > self._contents.shard_tokens:
            self._close_shard(shard)
            shard = None
        if shard is None:
            shard = ShardWriter(self._folder, f"{SHARD_PREFIX}-{len(self._shards):05d}", self._dtype)
            self._shard = shard
        shard.add(document)

    def finish(self, source: dict[str, Any]) -> Manifest:
        """Close the last shard, copy the tokenizer, and write the manifest last."""
        if self._shard is not None:
            self._close_shard(self._shard)
        tokenizer = self._contents.tokenizer
        tokenizer.copy_to(self._folder / TOKENIZER_FOLDER)
        manifest = Manifest(
            tokenizer=TokenizerRecord(
                name=tokenizer.name,
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                special_ids=tokenizer.special_ids,
            ),
            rule=self._contents.rule,
            dtype="uint16" if self._dtype == np.uint16 else "int32",
            shards=tuple(self._shards),
            source=source,
        )
        manifest.save(self._folder)
        return manifest

    def discard(self) -> None:
        """Drop the shard being written."""
        if self._shard is not None:
            self._shard.__exit__(None, None, None)

    def _close_shard(self, shard: ShardWriter) -> None:
        with shard:
            self._shards.append(shard.finish())
        self._shard = None


class OutputFolders:
    """The dataset folder of a run, or with partitions one below it for each value; removes them all on an exception.

    Args:
        folder: of the whole output; to be made ready by `prepare_folder`.
        contents: what all datasets have in common.
        partitioned: whether documents go to one dataset per value of `document.partition`.
    """

    def __init__(self, folder: Path, contents: Contents, partitioned: bool) -> None:
        self._folder = folder
        self._contents = contents
        self._partitioned = partitioned
        self._writers: dict[str, tuple[Path, DatasetWriter]] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        if not self._folder.exists():
            self._undo.callback(_remove_if_empty, self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._undo.pop_all()
        self._undo.close()

    def add(self, document: TokenizedDocument) -> None:
        """Append a document to the dataset it belongs to."""
        found = self._writers.get(document.partition)
        if found is None:
            found = self._writers[document.partition] = self._open(document.partition)
        found[1].add(document)

    def finish(self, source: dict[str, Any]) -> dict[Path, Manifest]:
        """Make every folder a dataset; `source` goes into each manifest, with the value of its partition."""
        return {
            folder: writer.finish(source | ({"partition": value} if self._partitioned else {}))
            for value, (folder, writer) in self._writers.items()
        }

    def _open(self, value: str) -> tuple[Path, DatasetWriter]:
        if len(self._writers) == MAX_PARTITIONS:
            raise DataError(
                f"The partition key has more than {MAX_PARTITIONS} values; the last seen is {value!r}",
                remedy="Partition by a key with few values, such as meta.pile_set_name",
                place="--partition-by",
            )
        folder = self._folder
        if self._partitioned:
            taken = {path.name for path, _ in self._writers.values()}
            folder = self._folder / partition_slug(value, taken)
        writer = DatasetWriter(folder, self._contents)
        self._undo.callback(_clear_dataset, folder)
        self._undo.callback(writer.discard)
        return folder, writer


def partition_slug(value: str, taken: set[str]) -> str:
    """Folder name for a partition's value: "Gutenberg (PG-19)" becomes "gutenberg-pg-19".

    Lower case, since some file systems know no other; every run of characters outside a-z, 0-9, "." and "_" becomes
    a hyphen. A value that leaves nothing, or whose name is taken, gets eight digits of its SHA-256.
    """
    slug = re.sub(r"[^a-z0-9._]+", "-", value.lower()).strip("-.")[:100]
    if slug and slug not in taken | {TOKENIZER_FOLDER}:
        return slug
    return f"{slug or 'partition'}-{hashlib.sha256(value.encode()).hexdigest()[:8]}"


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make sure that nothing is in the way, removing an earlier output if allowed.

    Raises:
        DataError: an earlier output without `overwrite`, or anything that this tool did not write.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError("The output must be a folder, and this is a file", remedy="Name another", place=folder)
    parts = [folder, *(path for path in folder.iterdir() if path.is_dir() and path.name != TOKENIZER_FOLDER)]
    foreign = next((path for part in parts for path in part.iterdir() if not _is_own(path) and path not in parts), None)
    if foreign is not None:
        raise DataError(
            f"The output folder holds something that is no part of a dataset: {foreign.relative_to(folder)}",
            remedy="Name another folder, or move it away",
            place=folder,
        )
    if not any(folder.iterdir()):
        return
    if not overwrite:
        finished = any((part / MANIFEST_NAME).exists() for part in parts)
        raise DataError(
            "The output folder holds " + ("a dataset" if finished else "an unfinished dataset"),
            remedy="Name another folder, or add --overwrite to replace it",
            place=folder,
        )
    for part in reversed(parts):
        _clear_dataset(part)


def _is_own(path: Path) -> bool:
    if path.is_dir():
        return path.name == TOKENIZER_FOLDER and all(file.name in COMPANIONS for file in path.iterdir())
    return OWN_FILE.fullmatch(path.name) is not None


def _clear_dataset(folder: Path) -> None:
    """Remove a dataset's files, the manifest first so that what is left of it never looks finished."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for path in list(folder.iterdir()) if folder.exists() else []:
        if OWN_FILE.fullmatch(path.name):
            path.unlink()
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
