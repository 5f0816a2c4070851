"""Conversion of a dataset to another segment rule, from its tokens, without tokenizing again.

The new dataset becomes the output in one step, after its manifest is written.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
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
from megatron_bipe.data.shard_layout import PAIR_SUFFIXES, pack_seg, shard_path
from megatron_bipe.errors import DataError, failed_path
from megatron_bipe.io import atomic_directory, sha256_of, unfinished_path
from megatron_bipe.types import TokenArray


@dataclass(frozen=True)
class Job:
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
    check_output(output, [dataset.path.resolve()], overwrite)
    with dataset_draft(output, overwrite) as folder:
        job = Job(folder, rule, old.tokenizer.vocab_size)
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
    return new


@contextmanager
def dataset_draft(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yield the folder that becomes the dataset; an error of the disk in the block becomes a DataError."""
    try:
        with atomic_directory(output, overwrite=overwrite, check=_refuse_foreign) as folder:
            yield folder
    except OSError as error:
        raise DataError(
            f"The new dataset cannot be written: {error.strerror or error}",
            remedy="Free space or name another folder, then run the same command again",
            location=failed_path(error) or output,
        ) from error


def _resegment_shard(job: Job, shard: Shard, advance: Advance) -> ShardRecord:
    record = shard.record
    assert record is not None  # shards of a dataset have one
    shard = Shard(shard.folder, record)  # a new reader, whose index is freed after this shard
    tokens_sha256 = hashlib.sha256()
    num_segments, seg = write_ends(
        Segmenter(shard, job.rule, job.vocab_size),
        shard_path(job.folder, shard.name, "seg"),
        lambda _, tokens_T: tokens_sha256.update(tokens_T.data),
        advance,
    )
    check_checksum(shard, "bin", tokens_sha256.hexdigest())
    check_checksum(shard, "idx", sha256_of(shard.path("idx")))
    for suffix in PAIR_SUFFIXES:
        link_or_copy(shard.path(suffix), shard_path(job.folder, shard.name, suffix))
    return record.model_copy(update={"segments": num_segments, "files": {**record.files, "seg": seg}})


def write_ends(
    segmenter: Segmenter, path: Path, read: Callable[[int, TokenArray], object], advance: Advance
) -> tuple[int, FileRecord]:
    """Write the segment-end bits of a shard, and return the number of segments and the record of the file.

    Args:
        segmenter: the shard and its rule.
        path: file to write.
        read: called with the position of each slice of the tokens and the slice, before the rule is applied to it.
        advance: called with the number of tokens processed.
    """
    shard = segmenter.shard
    sha256, num_segments = hashlib.sha256(), 0
    with path.open("wb") as stream:
        header = pack_seg(shard.num_tokens, b"")
        stream.write(header)
        sha256.update(header)
        for start in range(0, shard.num_tokens, CHUNK_TOKENS):
            stop = min(start + CHUNK_TOKENS, shard.num_tokens)
            tokens_T = shard.tokens(start, stop)
            read(start, tokens_T)
            packed = segmenter.packed_ends(tokens_T, start)
            num_segments += int(np.bitwise_count(packed).sum())
            stream.write(packed.data)
            sha256.update(packed.data)
            advance(stop - start)
        return num_segments, FileRecord(bytes=stream.tell(), sha256=sha256.hexdigest())


def link_or_copy(origin: Path, target: Path) -> None:
    """Make `target` a hard link to a file, or a copy where the file system has no hard links."""
    try:
        os.link(origin.resolve(), target)
    except OSError:  # another file system, or no support for hard links
        shutil.copyfile(origin, target)


def check_output(output: Path, sources: Iterable[Path], overwrite: bool) -> None:
    """Raise an error if the output must not be replaced, before anything is written.

    Args:
        output: folder to make, an absolute path without links, as `sources` are.
        sources: what the dataset is made from, folders or files.
        overwrite: permit the replacement of a dataset.
    """
    for source in sources:
        if output.is_relative_to(source) or any(map(source.is_relative_to, (output, unfinished_path(output)))):
            what = f"The output contains the source {source}, or is inside it"
            raise DataError(what, remedy="Name another folder", location=output)
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
        own = dataset_files(folder, (shard.name for shard in Manifest.load(folder).shards))
    foreign = next(foreign_paths(folder, own), None)
    if foreign:
        raise DataError(
            f"The folder holds something that no manifest in it lists: {foreign.relative_to(folder)}",
            remedy="Name another folder, or move it elsewhere",
            location=folder,
        )
