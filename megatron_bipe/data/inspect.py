"""Is a dataset folder whole, and what is in it. Torch-free; `show.py` draws single documents."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from megatron_bipe.data.dataset import TokenDataset, foreign_token
from megatron_bipe.data.files import sha256_of
from megatron_bipe.data.format import Shard
from megatron_bipe.data.layout import SEG_HEADER, damaged
from megatron_bipe.data.manifest import MANIFEST_NAME, TOKENIZER_FOLDER, Manifest
from megatron_bipe.data.records import SUFFIXES
from megatron_bipe.data.segments import SegmentRule, resolve_rule, segment_ends
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.errors import DataError

CHUNK_TOKENS = 1 << 22  # looked at together: bounds the memory that checking takes


def find_problems(dataset: TokenDataset, advance: Callable[[int], object] = lambda _: None) -> Iterator[DataError]:
    """Everything that opening does not look at: tokenizer, checksums, indices, ids, bits.

    Args:
        dataset: an opened dataset, which is itself a check of sizes and headers.
        advance: told the size of every file that has been read, for a progress bar.

    Yields:
        One error for each wrong file checksum, and the first other problem of each shard.
    """
    yield from _tokenizer_problems(dataset)
    for shard, record in zip(dataset.shards, dataset.manifest.shards, strict=True):
        for suffix in SUFFIXES:
            path, recorded = shard.path(suffix), record.files[suffix]
            found = sha256_of(path)
            if found != recorded.sha256:
                yield damaged(path, f"its SHA-256 is {found}; the manifest says {recorded.sha256}")
            advance(recorded.bytes)
        try:
            _check_shard(shard, dataset.rule, dataset.manifest.tokenizer.vocab_size)
        except DataError as error:
            yield error


def open_tokenizer(dataset: TokenDataset) -> Tokenizer:
    """The tokenizer beside the shards.

    Raises:
        DataError: it is not there, or not the one that the data was made with.
    """
    folder = dataset.path / TOKENIZER_FOLDER
    if not folder.is_dir():  # else the name would be looked for on the Hub
        raise DataError("the tokenizer's files are missing", remedy="Copy the dataset again in full", place=folder)
    tokenizer = load_tokenizer(folder)
    dataset.check_tokenizer(tokenizer.fingerprint, folder)
    return tokenizer


def stats_table(manifest: Manifest) -> str:
    """Counts and means: a line a shard and one for all."""
    rows = [["shard", "documents", "tokens", "segments", "text bytes", "tokens/segment", "segments/1024 tokens"]]
    rows += [_stats_row(s.name, s.documents, s.tokens, s.segments, s.text_bytes) for s in manifest.shards]
    counts = manifest.num_documents, manifest.num_tokens, manifest.num_segments, manifest.text_bytes
    rows.append(_stats_row("all", *counts))
    ids = manifest.rule.token_ids
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    tokenizer = manifest.tokenizer
    return "\n".join(
        [
            f"tokenizer  {tokenizer.name}: {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint[:16]}",
            f"segments   {manifest.rule.spec}" + (f": {len(ids)} token ids ({shown})" if ids else ""),
            f"stored as  {manifest.dtype} and one bit a token, fingerprint {manifest.fingerprint[:16]}",
            "",
            _align(rows),
        ]
    )


def _tokenizer_problems(dataset: TokenDataset) -> Iterator[DataError]:
    try:
        rule = resolve_rule(dataset.rule.spec, open_tokenizer(dataset))
    except DataError as error:
        yield error
        return
    if rule != dataset.rule:
        yield DataError(
            f"field rule.token_ids lists {len(dataset.rule.token_ids)} ids; rule {rule.spec!r} comes out as "
            f"{len(rule.token_ids)} others with the dataset's own tokenizer",
            remedy="Make the dataset again",
            place=dataset.path / MANIFEST_NAME,
        )


def _check_shard(shard: Shard, rule: SegmentRule, vocab_size: int) -> None:
    """Index, padding, ids, bits against a new segmentation, and their number against the record."""
    bounds = shard.document_bounds
    spare_bits = -shard.num_tokens % 8
    if spare_bits and int(shard.packed_ends[-1]) >> (8 - spare_bits):
        last = SEG_HEADER.size + shard.packed_ends.size - 1
        raise damaged(shard.path("seg"), f"byte {last}, the last, has bits set beyond the {shard.num_tokens} tokens")
    # A rule that looks at tokens does not care where documents start; one that counts does.
    chunks = [*range(0, shard.num_tokens, CHUNK_TOKENS), shard.num_tokens]
    num_segments = 0
    for start, stop in itertools.pairwise(chunks if rule.fixed_length is None else bounds.tolist()):
        tokens, ends = shard.tokens(start, stop), shard.ends(start, stop)
        foreign = np.flatnonzero(tokens.view(f"u{tokens.dtype.itemsize}") >= vocab_size)
        if foreign.size:
            raise foreign_token(shard, start + int(foreign[0]), int(tokens[foreign[0]]), vocab_size)
        wrong = np.flatnonzero(ends != segment_ends(tokens, rule))
        if wrong.size:
            place = start + int(wrong[0])
            where = f"byte {SEG_HEADER.size + place // 8}, bit {place % 8} (token {place}, id {tokens[wrong[0]]})"
            what = f"{where} is {int(ends[wrong[0]])}; rule {rule.spec!r} makes it {int(not ends[wrong[0]])}"
            raise damaged(shard.path("seg"), what)
        num_segments += int(np.count_nonzero(ends))
    if shard.record and num_segments != shard.record.segments:
        what = f"{num_segments} bits are set; the manifest says {shard.record.segments} segments"
        raise damaged(shard.path("seg"), what)


def _stats_row(name: str, documents: int, tokens: int, segments: int, text_bytes: int) -> list[str]:
    length = f"{tokens / segments:.2f}" if segments else "-"
    density = f"{1024 * segments / tokens:.2f}" if tokens else "-"
    return [name, f"{documents:,}", f"{tokens:,}", f"{segments:,}", f"{text_bytes:,}", length, density]


def _align(rows: list[list[str]]) -> str:
    """Names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)
