"""Common parts of the benchmarks that need no torch: description of the machine, timing, and input data."""

import hashlib
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import orjson
import zstandard

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import TOKENIZER_FOLDER, Manifest, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule, segment_ends
from megatron_bipe.data.shard import ShardWriter, choose_dtype
from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.runtime.environment import cpu_facts
from megatron_bipe.types import TokenizedDocument

TEXT_SUFFIXES = (".py", ".rst", ".txt", ".md", ".html", ".h", ".c", ".hpp", ".js", ".pyi")
MAX_TEXT_FILE_BYTES = 2_000_000  # larger files are data
SKIPPED_FOLDERS = ("/proc", "/sys", "/dev", "/tmp")
SPECIAL_TOKENS = (b"<s>", b"</s>", b"<unk>")  # libraries disagree on whether these are special tokens in a text

VOCAB_SIZE, SEGMENT_TOKENS = 32000, 13.7  # mean segment length of PG-19 under the authors' rule
DOCUMENT_TOKENS, FIRST_ORDINARY_ID = 1500, 1000
NEWLINE_RULE = SegmentRule(spec="newline", token_ids=(13,))


def describe_machine(*packages: str) -> str:
    """Return the CPU model, cores, Python version and versions of `packages` in one line."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return f"{cpu_facts().name}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def median_seconds(contenders: Mapping[str, Callable[[int], object]], repeats: int) -> dict[str, float]:
    """Time contenders alternately in this process; each is called with the number of the repetition.

    An additional first call, which warms the caches, is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(-1, repeats):
        for name, run in contenders.items():
            began_s = time.perf_counter()
            run(max(repeat, 0))
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(found) for name, found in seconds.items()}


def make_dataset(
    folder: Path,
    num_tokens: int,
    rule: SegmentRule = NEWLINE_RULE,
    num_shards: int = 4,
    tokenizer: Tokenizer | None = None,
) -> TokenDataset:
    """Write a dataset of at least `num_tokens` random tokens, with the segment lengths of the authors' data."""
    generator = np.random.default_rng(0)
    vocab_size = VOCAB_SIZE if tokenizer is None else tokenizer.vocab_size
    first_id, dtype = min(FIRST_ORDINARY_ID, vocab_size // 2), choose_dtype(vocab_size)
    end_ids = np.array(rule.token_ids or NEWLINE_RULE.token_ids, dtype=dtype)
    records = []
    for number in range(num_shards):
        with ShardWriter(folder, f"bench-{number:05d}", dtype) as writer:
            while writer.num_tokens < num_tokens // num_shards:
                tokens_T = generator.integers(first_id, vocab_size, DOCUMENT_TOKENS).astype(dtype)
                ends_T = generator.random(DOCUMENT_TOKENS) < 1 / SEGMENT_TOKENS
                tokens_T[ends_T] = generator.choice(end_ids, int(ends_T.sum()))
                writer.add(TokenizedDocument(tokens_T, segment_ends(tokens_T, rule), DOCUMENT_TOKENS, ""))
            records.append(writer.finish())
    record = TokenizerRecord(name="none", fingerprint="0" * 64, vocab_size=VOCAB_SIZE, special_ids={})
    if tokenizer is not None:  # training, export and generation need its files
        tokenizer.copy_to(folder / TOKENIZER_FOLDER)
        record = tokenizer.record
    Manifest(tokenizer=record, rule=rule, dtype=dtype.name, shards=tuple(records), source={}).save(folder)
    return TokenDataset(folder)


def collect_corpus(file: Path, roots: Sequence[Path], max_bytes: float) -> int:
    """Write the distinct text files below `roots` as lines of a .jsonl.zst, and return the bytes of their text."""
    text_bytes = 0
    digests: set[bytes] = set()
    # Files are in the order of a hash of their paths, so that the first part of a corpus resembles all of it.
    sources = sorted(_text_files(roots), key=lambda path: hashlib.md5(os.fsencode(path)).digest())
    with file.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as stream:
        for source in sources:
            text = source.read_bytes()
            digest = hashlib.blake2b(text).digest()
            if digest in digests or not text or any(token in text for token in SPECIAL_TOKENS):
                continue
            digests.add(digest)
            try:
                line = orjson.dumps({"text": text.decode(), "meta": {"file": source.name}})
            except ValueError:  # the text or the file's name is not UTF-8
                continue
            stream.write(line + b"\n")
            text_bytes += len(text)
            if text_bytes > max_bytes:
                break
    return text_bytes


def _text_files(roots: Sequence[Path]) -> Iterator[Path]:
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if str(Path(folder) / name) not in SKIPPED_FOLDERS]
            for name in names:
                path = Path(folder) / name
                if name.endswith(TEXT_SUFFIXES) and path.is_file() and path.stat().st_size < MAX_TEXT_FILE_BYTES:
                    yield path
