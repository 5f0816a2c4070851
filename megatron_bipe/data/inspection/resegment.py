"""Conversion of a dataset to another segment rule, from its tokens, without tokenizing again.

The new dataset becomes the output in one step, after its manifest is written.
"""

import hashlib
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_bipe.data.dataset import TokenDataset, dataset_files, foreign_paths, open_tokenizer
from megatron_bipe.data.inspection.verify import CHUNK_TOKENS, Advance, Segmenter, check_checksum, run_in_order
from megatron_bipe.data.manifest import (
    TOKENIZER_FOLDER,
    FileRecord,
    Manifest,
    ShardRecord,
)
from megatron_bipe.data.segments import SegmentRule, resolve_rule
from megatron_bipe.data.shard import Shard
from megatron_bipe.data.shard_layout import Suffix, pack_seg, shard_path
from megatron_bipe.errors import DataError, failed_path
from megatron_bipe.io import atomic_directory, sha256_of, unfinished_path

UNCHANGED: tuple[Suffix, ...] = ("bin", "idx")


@dataclass(frozen=True)
class _Job:
    """Settings shared by all shards of one run."""

    folder: Path  # output folder
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
    """Make the dataset that tools/preprocess.py would have made with another rule.

    `.bin` and `.idx` become hard links if the file system allows it, else copies; their checksums are taken from the
    manifest of `source`.

    Args:
        source: folder of the existing dataset.
        spec: the new rule, in the form that `resolve_rule` reads.
        output: folder to create.
        workers: number of shards that are processed in parallel.
        overwrite: replace an existing dataset after the new one is complete.
        advance: called with the number of tokens processed.

    Raises:
        DataError: the dataset is incomplete or damaged or holds ids outside its vocabulary, the vocabulary has no token
            for the rule, the output must not be replaced, or the disk is full. Nothing of the new dataset is left then.
    """
    dataset = TokenDataset(source)
    tokenizer = open_tokenizer(dataset)
    old = dataset.manifest
    rule = resolve_rule(spec, tokenizer)
    output = Path(output).resolve()
    _check_output(output, dataset.path.resolve(), overwrite)
    try:
        with atomic_directory(output, overwrite=overwrite, check=_refuse_foreign) as folder:
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
            new.save(folder)
    except OSError as error:
        raise DataError(
            f"The new dataset cannot be written: {error.strerror or error}",
            remedy="Free space or name another folder, then run the same command again",
            location=failed_path(error) or output,
        ) from error
    return new


def _resegment_shard(job: _Job, shard: Shard, advance: Advance) -> ShardRecord:
    record = shard.record
    assert record is not None  # shards of a dataset have one
    shard = Shard(shard.folder, record)  # a new reader, whose index is freed after this shard
    segmenter = Segmenter(shard, job.rule, job.vocab_size)
    path = shard_path(job.folder, shard.name, "seg")
    sha256, tokens_sha256, num_segments = hashlib.sha256(), hashlib.sha256(), 0
    with path.open("wb") as stream:
        header = pack_seg(shard.num_tokens, b"")
        stream.write(header)
        sha256.update(header)
        for start in range(0, shard.num_tokens, CHUNK_TOKENS):
            stop = min(start + CHUNK_TOKENS, shard.num_tokens)
            tokens_T = shard.tokens(start, stop)
            tokens_sha256.update(tokens_T.data)
            packed = segmenter.packed_ends(tokens_T, start)
            num_segments += int(np.bitwise_count(packed).sum())
            stream.write(packed.data)
            sha256.update(packed.data)
            advance(stop - start)
        size = stream.tell()
    check_checksum(shard, "bin", tokens_sha256.hexdigest())
    check_checksum(shard, "idx", sha256_of(shard.path("idx")))
    for suffix in UNCHANGED:
        _link_or_copy(shard.path(suffix), shard_path(job.folder, shard.name, suffix))
    files: dict[Suffix, FileRecord] = {**record.files, "seg": FileRecord(bytes=size, sha256=sha256.hexdigest())}
    return record.model_copy(update={"segments": num_segments, "files": files})


def _link_or_copy(origin: Path, target: Path) -> None:
    try:
        os.link(origin.resolve(), target)
    except OSError:  # another file system, or no support for hard links
        shutil.copyfile(origin, target)


def _check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Raise an error if the output must not be replaced, before anything is written."""
    if output.is_relative_to(source) or source.is_relative_to(unfinished_path(output)):
        raise DataError(
            "The output is the dataset itself or is inside it", remedy="Name another folder", location=output
        )
    if not output.exists():
        return
    if not output.is_dir():
        raise DataError("The output is a file; it must be a folder", remedy="Name another", location=output)
    if output.is_mount():
        what = "The output is a mount point, which cannot be replaced"
        raise DataError(what, remedy="Name a folder inside it", location=output)
    _refuse_foreign(output)
    if any(output.iterdir()) and not overwrite:
        raise DataError(
            "The output folder holds a dataset, or part of one",
            remedy="Name another folder, or add --overwrite to replace it",
            location=output,
        )


def _refuse_foreign(folder: Path) -> None:
    """Raise an error if the folder holds anything but a dataset, whose files its manifest lists."""
    own: set[Path] = set()
    with suppress(DataError):  # without a valid manifest, no file is known to be of a dataset
        own = dataset_files(folder)
    foreign = next(foreign_paths(folder, own), None)
    if foreign:
        raise DataError(
            f"The folder holds something that no manifest in it lists: {foreign.relative_to(folder)}",
            remedy="Name another folder, or move it elsewhere",
            location=folder,
        )
