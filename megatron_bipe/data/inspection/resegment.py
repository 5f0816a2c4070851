"""A dataset again under another segment rule: new bits from the tokens that are there, nothing tokenized again.

The new folder grows beside its place, under a temporary name, and is renamed once its manifest is written.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.discovery import open_tokenizer
from megatron_bipe.data.manifest import (
    MANIFEST_NAME,
    SUFFIXES,
    TOKENIZER_FOLDER,
    FileRecord,
    Manifest,
    ShardRecord,
    Suffix,
)
from megatron_bipe.data.parallel_map import Advance, run_in_order
from megatron_bipe.data.segmenter import CHUNK_TOKENS, Segmenter
from megatron_bipe.data.segments import SegmentRule, resolve_rule
from megatron_bipe.data.shard import Shard
from megatron_bipe.data.shard_layout import pack_seg, shard_path
from megatron_bipe.data.tokenizer import COMPANIONS
from megatron_bipe.errors import DataError
from megatron_bipe.io import partial_path, sync

UNCHANGED: tuple[Suffix, ...] = ("bin", "idx")


@dataclass(frozen=True)
class _Job:
    """What the shards of one run have in common."""

    folder: Path  # that they are written to
    rule: SegmentRule
    vocab_size: int


def resegment(
    source: Path,
    spec: str,
    output: Path,
    *,
    workers: int = 1,
    overwrite: bool = False,
    advance: Advance = lambda _: None,
) -> Manifest:
    """Make the dataset that tools/preprocess.py would have made with this rule, from the dataset it made with another.

    `.bin` and `.idx` become hard links where the file system allows, else copies; their checksums are taken over from
    the manifest of `source`.

    Args:
        source: folder of a dataset.
        spec: the rule, as `resolve_rule` reads it.
        output: folder to make.
        workers: shards that are done at once.
        overwrite: replace a dataset that is there, once the new one is finished.
        advance: told the tokens that have been done.

    Raises:
        DataError: no whole dataset there, a rule that its vocabulary has no token for, ids outside the vocabulary, an
            output that may not be replaced, a full disk. Nothing of the new dataset is left then.
    """
    dataset = TokenDataset(source)
    tokenizer = open_tokenizer(dataset)
    old = dataset.manifest
    rule = resolve_rule(spec, tokenizer)
    output = Path(output).resolve()
    names = _file_names(old)
    _check_output(output, dataset.path.resolve(), names, overwrite)
    try:
        with _work_folder(work_path(output), names) as folder:
            job = _Job(folder, rule, old.tokenizer.vocab_size)
            shards = run_in_order(partial(_resegment_shard, job), dataset.shards, workers, advance)
            new = Manifest(
                tokenizer=old.tokenizer,
                rule=rule,
                dtype=old.dtype,
                shards=tuple(shards),
                examples=old.examples,
                source=old.source | {"resegmented_from": {"rule": old.rule.spec, "fingerprint": old.fingerprint}},
            )
            tokenizer.copy_to(folder / TOKENIZER_FOLDER)
            sync(folder / TOKENIZER_FOLDER)
            new.save(folder)
            if output.exists():
                _clear(output, names | _names_in(output))
            folder.rename(output)
        sync(output.parent)
    except OSError as error:
        raise DataError(
            f"The new dataset cannot be written: {error.strerror or error}",
            remedy="Free space or name another folder, then run the same command again",
            location=error.filename or output,
        ) from error
    return new


def work_path(output: Path) -> Path:
    """Where the new dataset grows: on the same file system, so that renaming it is one step."""
    return output.with_name(f".{output.name}.unfinished")


def _resegment_shard(job: _Job, shard: Shard, advance: Advance) -> ShardRecord:
    record = shard.record
    assert record is not None  # the shards of a dataset have one
    shard = Shard(shard.folder, record)  # whose index goes when it has been done
    made = Segmenter(shard, job.rule, job.vocab_size)
    path = shard_path(job.folder, shard.name, "seg")
    sha256, num_segments = hashlib.sha256(), 0
    with path.open("wb") as stream:
        header = pack_seg(shard.num_tokens, b"")
        stream.write(header)
        sha256.update(header)
        for start in range(0, shard.num_tokens, CHUNK_TOKENS):
            stop = min(start + CHUNK_TOKENS, shard.num_tokens)
            packed = made.packed_ends(shard.tokens(start, stop), start)
            num_segments += int(np.bitwise_count(packed).sum())
            stream.write(packed.data)
            sha256.update(packed.data)
            advance(stop - start)
        stream.flush()
        os.fsync(stream.fileno())
        size = stream.tell()
    for suffix in UNCHANGED:
        _link_or_copy(shard.path(suffix), shard_path(job.folder, shard.name, suffix))
    files: dict[Suffix, FileRecord] = {**record.files, "seg": FileRecord(bytes=size, sha256=sha256.hexdigest())}
    return record.model_copy(update={"segments": num_segments, "files": files})


def _link_or_copy(origin: Path, target: Path) -> None:
    try:
        os.link(origin.resolve(), target)
    except OSError:  # another file system, or one that has no hard links
        shutil.copyfile(origin, target)
        sync(target)


def _check_output(output: Path, source: Path, names: set[str], overwrite: bool) -> None:
    """Refuse what may not be replaced, before anything is written."""
    if output.is_relative_to(source) or work_path(output) == source:
        raise DataError(
            "The output is the dataset itself, or lies in it", remedy="Name another folder", location=output
        )
    if not output.exists():
        return
    if not output.is_dir():
        raise DataError("The output must be a folder, and this is a file", remedy="Name another", location=output)
    if output.is_mount():
        what = "The output is where a file system is mounted, and cannot be replaced"
        raise DataError(what, remedy="Name a folder in it", location=output)
    _refuse_foreign(output, names | _names_in(output))
    if any(output.iterdir()) and not overwrite:
        raise DataError(
            "The output folder holds a dataset, or part of one",
            remedy="Name another folder, or add --overwrite to replace it",
            location=output,
        )


@contextmanager
def _work_folder(folder: Path, names: set[str]) -> Iterator[Path]:
    """An empty folder that no other run writes to, left by a killed one or new; removed if the work in it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except BlockingIOError:
            raise DataError(
                "Another run is writing this dataset", remedy="Wait for it, or name another folder", location=folder
            ) from None
        except OSError:  # a file system that has no locks
            pass
        _refuse_foreign(folder, names)
        _clear(folder, names, but_folder=True)
        try:
            yield folder
        except BaseException:
            _clear(folder, names)
            raise
    finally:
        os.close(descriptor)


def _file_names(manifest: Manifest) -> set[str]:
    """Files of a dataset, but for its tokenizer's."""
    manifests = {MANIFEST_NAME, partial_path(Path(MANIFEST_NAME)).name}
    return manifests | {shard_path(Path(), shard.name, suffix).name for shard in manifest.shards for suffix in SUFFIXES}


def _names_in(folder: Path) -> set[str]:
    """Files of the dataset that a folder holds; none where it has no good manifest."""
    try:
        return _file_names(Manifest.load(folder))
    except DataError:
        return set()


def _refuse_foreign(folder: Path, names: set[str]) -> None:
    foreign = [path for path in folder.iterdir() if path.name not in names and path.name != TOKENIZER_FOLDER]
    foreign += [path for path in folder.iterdir() if path.name in names and path.is_dir()]
    if (folder / TOKENIZER_FOLDER).is_dir():
        foreign += [path for path in (folder / TOKENIZER_FOLDER).iterdir() if path.name not in COMPANIONS]
    if foreign:
        raise DataError(
            f"The folder holds something that is no part of this dataset: {min(foreign).relative_to(folder)}",
            remedy="Name another folder, or move it away",
            location=folder,
        )


def _clear(folder: Path, names: set[str], *, but_folder: bool = False) -> None:
    """Remove a dataset, its manifest first so that what is left of it never looks finished."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for name in sorted(names):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    if not but_folder:
        folder.rmdir()
