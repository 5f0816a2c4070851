"""Conversion of Megatron's indexed datasets, pairs of .bin and .idx, to a dataset with segments and a manifest.

The dataset becomes the output in one step, after its manifest is written. The pairs stay as they are.
"""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_bipe.data.inspection.megatron_pairs import MAX_NAMES_IN_MESSAGE, MegatronPair
from megatron_bipe.data.inspection.resegment import Job, check_output, dataset_draft, link_or_copy, write_ends
from megatron_bipe.data.inspection.verify import CHUNK_TOKENS, Advance, Segmenter, run_in_order
from megatron_bipe.data.manifest import TOKENIZER_FOLDER, FileRecord, Manifest, ShardRecord
from megatron_bipe.data.segments import resolve_rule
from megatron_bipe.data.shard_layout import (
    DTYPE_CODES,
    PAIR_SUFFIXES,
    SUFFIXES,
    choose_dtype,
    dtype_name,
    pack_idx,
    shard_name,
    shard_path,
)
from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.io import sha256_of
from megatron_bipe.types import IntArray, TokenArray

SAME_TOKENIZER = "Give the tokenizer with which the pair was made"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _PairJob(Job):
    """Settings shared by all pairs of one run."""

    dtype: np.dtype[Any]  # of the dataset
    bos_id: int
    eos_id: int  # BOS, if the tokenizer has no EOS


class DocumentCounts(NamedTuple):
    """Numbers of documents by what begins and ends them."""

    total: int
    empty: int
    begin_with_bos: int
    end_with_eos: int  # with BOS, if the tokenizer has no EOS


def convert_pairs(
    pairs: Sequence[MegatronPair],
    tokenizer: Tokenizer,
    spec: str,
    output: Path,
    *,
    workers: int = 1,
    overwrite: bool = False,
    advance: Advance = lambda _: None,
) -> Manifest:
    """Make a dataset of Megatron's pairs: one shard for each, with its tokens in the same order.

    `.bin` and `.idx` become hard links if the file system allows it, else copies. Where the format differs, they are
    written again: types other than uint16 and int32, pairs of different types, documents of several sequences. The
    length of the text stays unknown.

    Args:
        pairs: pairs in the order of the shards.
        tokenizer: the tokenizer that made the tokens.
        spec: the segment rule, in the form that `resolve_rule` reads.
        output: folder to create.
        workers: number of pairs that are processed in parallel.
        overwrite: replace an existing dataset after the new one is complete.
        advance: called with the number of tokens processed.

    Raises:
        DataError: a pair is damaged, empty or of another tokenizer, the vocabulary has no token for the rule, the
            output must not be replaced, or the disk is full. Nothing of the new dataset is left then.
    """
    rule = resolve_rule(spec, tokenizer)
    output = Path(output).resolve()
    check_output(output, [pair.path(suffix).resolve() for pair in pairs for suffix in PAIR_SUFFIXES], overwrite)
    _check_pairs(pairs, tokenizer)
    dtype = _storage_dtype(pairs, tokenizer.vocab_size)
    with dataset_draft(output, overwrite) as folder:
        eos_id = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
        job = _PairJob(folder, rule, tokenizer.vocab_size, dtype, tokenizer.bos_id, eos_id)
        converted = run_in_order(partial(_convert_pair, job), [*enumerate(pairs)], workers, advance)
        shards, counts = zip(*converted, strict=True)
        documents = DocumentCounts(*map(sum, zip(*counts, strict=True)))
        new = Manifest(
            tokenizer=tokenizer.record,
            rule=rule,
            dtype=dtype_name(dtype),
            shards=shards,
            source={"megatron_pairs": [_describe(pair) for pair in pairs], "documents": documents._asdict()},
        )
        tokenizer.copy_to(folder / TOKENIZER_FOLDER)
        new.save(folder)
    _warn_of_other_convention(documents, job)
    return new


def _check_pairs(pairs: Sequence[MegatronPair], tokenizer: Tokenizer) -> None:
    """Raise the errors that need no tokens, before hours of work."""
    for pair in pairs:
        if np.iinfo(pair.dtype).max < tokenizer.vocab_size - 1:
            what = f"{pair.dtype.name} cannot hold all ids of the tokenizer, {tokenizer.name}, which has"
            raise DataError(
                f"{what} {tokenizer.vocab_size}: its largest ids would have become others",
                remedy=SAME_TOKENIZER,
                location=pair.path("idx"),
            )
        _ = MegatronPair(pair.prefix).document_bounds  # of a new reader, so that the index is freed
    if not any(pair.num_tokens for pair in pairs):
        names = ", ".join(pair.path("bin").name for pair in pairs[:MAX_NAMES_IN_MESSAGE])
        raise DataError(f"there are no tokens in {names}", remedy="Name other pairs", location=pairs[0].prefix.parent)


def _storage_dtype(pairs: Sequence[MegatronPair], vocab_size: int) -> np.dtype[Any]:
    """Return the type that all pairs have, if datasets may have it, so that they need not be copied."""
    found = {pair.dtype for pair in pairs}
    return found.pop() if len(found) == 1 and found <= DTYPE_CODES.keys() else choose_dtype(vocab_size)


def _convert_pair(
    job: _PairJob, numbered: tuple[int, MegatronPair], advance: Advance
) -> tuple[ShardRecord, DocumentCounts]:
    number, pair = numbered
    pair = MegatronPair(pair.prefix)  # a new reader, whose index is freed after this pair
    targets = {suffix: shard_path(job.folder, shard_name(number), suffix) for suffix in SUFFIXES}
    keeps_tokens = pair.dtype == job.dtype
    tokens_sha256, documents = hashlib.sha256(), _DocumentScan(job, pair)
    with nullcontext() if keeps_tokens else targets["bin"].open("wb") as stream:

        def read(start: int, tokens_T: TokenArray) -> None:
            documents.count(start, tokens_T)
            stored_T = tokens_T.astype(job.dtype, copy=False)
            tokens_sha256.update(stored_T.data)
            if stream:
                stream.write(stored_T.data)

        num_segments, seg = write_ends(Segmenter(pair, job.rule, job.vocab_size), targets["seg"], read, advance)
    if keeps_tokens:
        link_or_copy(pair.path("bin"), targets["bin"])
    if keeps_tokens and pair.has_one_sequence_per_document:
        link_or_copy(pair.path("idx"), targets["idx"])
    else:
        targets["idx"].write_bytes(pack_idx(np.diff(pair.document_bounds), job.dtype))
    sha256 = {"bin": tokens_sha256.hexdigest(), "idx": sha256_of(targets["idx"])}
    files = {
        suffix: FileRecord(bytes=targets[suffix].stat().st_size, sha256=sha256[suffix]) for suffix in PAIR_SUFFIXES
    }
    record = ShardRecord(
        name=shard_name(number),
        documents=documents.counts.total,
        tokens=pair.num_tokens,
        segments=num_segments,
        text_bytes=None,
        files={**files, "seg": seg},
    )
    return record, documents.counts


class _DocumentScan:
    """Check of a pair's ids, and counts of its documents, slice by slice."""

    def __init__(self, job: _PairJob, pair: MegatronPair) -> None:
        self._job, self._pair = job, pair
        bounds = pair.document_bounds
        has_tokens = np.diff(bounds) > 0
        self._firsts, self._lasts = bounds[:-1][has_tokens], bounds[1:][has_tokens] - 1
        num_empty = has_tokens.size - self._firsts.size
        self.counts = DocumentCounts(has_tokens.size, num_empty, begin_with_bos=0, end_with_eos=0)

    def count(self, start: int, tokens_T: TokenArray) -> None:
        """Count the documents that begin and end in the tokens from `start` on; raise DataError if an id is invalid."""
        # Negative ids are large as unsigned numbers, so one bound is enough.
        outside_T = tokens_T.view(f"u{tokens_T.dtype.itemsize}") >= self._job.vocab_size
        if outside_T.any():
            raise self._outside_error(start + int(np.argmax(outside_T)), int(tokens_T[outside_T][0]))

        def matches(positions: IntArray, token: int) -> int:
            low, high = np.searchsorted(positions, [start, start + tokens_T.size])
            return int(np.count_nonzero(tokens_T[positions[low:high] - start] == token))

        self.counts = self.counts._replace(
            begin_with_bos=self.counts.begin_with_bos + matches(self._firsts, self._job.bos_id),
            end_with_eos=self.counts.end_with_eos + matches(self._lasts, self._job.eos_id),
        )

    def _outside_error(self, position: int, token: int) -> DataError:
        pair = self._pair
        document = int(np.searchsorted(pair.document_bounds, position, side="right")) - 1
        starts = range(0, pair.num_tokens, CHUNK_TOKENS)
        slices = (pair.tokens(start, min(start + CHUNK_TOKENS, pair.num_tokens)) for start in starts)
        lowest, highest = zip(*((int(tokens_T.min()), int(tokens_T.max())) for tokens_T in slices), strict=True)
        what = f"document {document} has id {token} (token {position} of the file); the ids of the file go from"
        return DataError(
            f"{what} {min(lowest)} to {max(highest)}, and the tokenizer has {self._job.vocab_size} ids",
            remedy=SAME_TOKENIZER,
            location=pair.path("bin"),
        )


def describe_documents(manifest: Manifest) -> str:
    """Describe the documents of a converted dataset: how many begin with BOS and end with EOS."""
    documents = DocumentCounts(**manifest.source["documents"])
    return (
        f"{documents.total} documents: {documents.begin_with_bos} begin with BOS, "
        f"{documents.end_with_eos} end with EOS, {documents.empty} are empty"
    )


def _warn_of_other_convention(documents: DocumentCounts, job: _PairJob) -> None:
    others = documents.total - documents.empty - documents.begin_with_bos
    if others:
        _log.warning(
            "%d of %d documents do not begin with BOS (id %d), and %d end with EOS (id %d). tools/preprocess.py begins "
            "each document with BOS, and so do generation and exported tokenizers: a model of this data begins a text "
            "in another way.",
            *(others, documents.total, job.bos_id, documents.end_with_eos, job.eos_id),
        )


def _describe(pair: MegatronPair) -> dict[str, str | int]:
    """Return the record of a pair in the manifest."""
    sizes = {f"{suffix}_bytes": pair.path(suffix).stat().st_size for suffix in PAIR_SUFFIXES}
    return {"name": pair.name, "dtype": pair.dtype.name, "sequences": pair.num_sequences, **sizes}
