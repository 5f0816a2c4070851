"""What tests of several folders share: small datasets, free ports."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tokenizers

from megatron_bipe.data.format import ShardWriter, choose_dtype
from megatron_bipe.data.manifest import ExamplesRecord, Manifest, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule, resolve_rule, segment_ends
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.types import TokenizedDocument
from tests.helpers.ranks import free_port as find_free_port

Shards = Sequence[Sequence[Sequence[int]]]  # documents by shard
SEPARATOR = 5
RULE = SegmentRule(spec=f"[{SEPARATOR}]", token_ids=(SEPARATOR,))


def _write_dataset(
    folder: Path,
    shards: Shards,
    *,
    rule: SegmentRule = RULE,
    vocab_size: int = 100,
    tokenizer: TokenizerRecord | None = None,
    examples: ExamplesRecord | None = None,
) -> Manifest:
    """Write documents of token ids; segment ends follow from the rule."""
    with mock.patch("os.fsync"):  # test_format.py tests it; here it would cost most of the time
        return _write(folder, shards, rule, vocab_size, tokenizer, examples)


def _write(
    folder: Path,
    shards: Shards,
    rule: SegmentRule,
    vocab_size: int,
    tokenizer: TokenizerRecord | None,
    examples: ExamplesRecord | None,
) -> Manifest:
    dtype = choose_dtype(vocab_size)
    records = []
    for number, documents in enumerate(shards):
        with ShardWriter(folder, f"part-{number:05d}", dtype) as writer:
            for ids in documents:
                tokens = np.array(ids, dtype=dtype)
                writer.add(TokenizedDocument(tokens, segment_ends(tokens, rule), 3 * len(ids), ""))
            records.append(writer.finish())
    tokenizer = tokenizer or TokenizerRecord(
        name="test", fingerprint="a" * 64, vocab_size=vocab_size, special_ids={"bos": 1}
    )
    manifest = Manifest(
        tokenizer=tokenizer,
        rule=rule,
        dtype=dtype.name,
        shards=tuple(records),
        source={"by": "test"},
        examples=examples,
    )
    manifest.save(folder)
    return manifest


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., Manifest]:
    return _write_dataset


def _write_letters(folder: Path, settings: dict[str, str]) -> Tokenizer:
    """A tokenizer's folder: one token a character, bytes for the rest."""
    characters = "abcdefghijklmnopqrstuvwxyz.\u2581\u4e16"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def _write_text_dataset(folder: Path, texts_by_shard: Sequence[Sequence[str]], spec: str = "newline") -> Manifest:
    """A dataset with a tokenizer of letters beside it, BOS first."""
    loaded = _write_letters(folder / "tokenizer", {"bos_token": "<s>"})
    shards = [[[1, *ids.tolist()] for ids in loaded.encode_batch(texts)] for texts in texts_by_shard]
    record = TokenizerRecord(
        name="letters",
        fingerprint=hashlib.sha256(loaded.definition.read_bytes()).hexdigest(),
        vocab_size=loaded.vocab_size,
        special_ids=loaded.special_ids,
    )
    rule = resolve_rule(spec, loaded)
    return _write_dataset(folder, shards, rule=rule, vocab_size=loaded.vocab_size, tokenizer=record)


@pytest.fixture(scope="session")
def write_text_dataset() -> Callable[..., Manifest]:
    return _write_text_dataset


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a character, with BOS and EOS."""
    return _write_letters(tmp_path_factory.mktemp("letters"), {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that names a TCP port that nothing listens on."""
    return find_free_port
