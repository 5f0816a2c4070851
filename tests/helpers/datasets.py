"""Small datasets and tokenizers."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import tokenizers

from megatron_bipe.data.manifest import Manifest, PromptAnswerRecord, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule, resolve_rule, segment_ends
from megatron_bipe.data.shard import ShardWriter, choose_dtype
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.types import TokenizedDocument

Shards = Sequence[Sequence[Sequence[int]]]  # documents by shard
SEPARATOR = 5
RULE = SegmentRule(spec=f"[{SEPARATOR}]", token_ids=(SEPARATOR,))


def write_dataset(
    folder: Path,
    shards: Shards,
    *,
    rule: SegmentRule = RULE,
    vocab_size: int = 100,
    tokenizer: TokenizerRecord | None = None,
    examples: PromptAnswerRecord | None = None,
    special_in_text: bool | None = None,
) -> Manifest:
    """Write documents of token ids; segment ends follow from the rule."""
    source = {"by": "test"} | ({} if special_in_text is None else {"special_in_text": special_in_text})
    with mock.patch("os.fsync"):  # test_shard.py tests it; here it would cost most of the time
        return _write(folder, shards, rule, vocab_size, tokenizer, examples, source)


def _write(
    folder: Path,
    shards: Shards,
    rule: SegmentRule,
    vocab_size: int,
    tokenizer: TokenizerRecord | None,
    examples: PromptAnswerRecord | None,
    source: dict[str, object],
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
        source=source,
        examples=examples,
    )
    manifest.save(folder)
    return manifest


def write_letters(folder: Path, settings: dict[str, str]) -> Tokenizer:
    """Write a tokenizer's folder: one token per character, bytes for the rest."""
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


def write_text_dataset(folder: Path, texts_by_shard: Sequence[Sequence[str]], spec: str = "newline") -> Manifest:
    """Write a dataset with a character tokenizer in its folder, BOS first."""
    loaded = write_letters(folder / "tokenizer", {"bos_token": "<s>"})
    shards = [[[1, *ids.tolist()] for ids in loaded.encode_batch(texts)] for texts in texts_by_shard]
    record = TokenizerRecord(
        name="letters",
        fingerprint=hashlib.sha256(loaded.definition.read_bytes()).hexdigest(),
        vocab_size=loaded.vocab_size,
        special_ids=loaded.special_ids,
    )
    rule = resolve_rule(spec, loaded)
    return write_dataset(folder, shards, rule=rule, vocab_size=loaded.vocab_size, tokenizer=record)


FEW_TEXTS = [["a cat\nsat.\n", "x\n\ny"], [], ["\u4e16\x1bz q\n", ""]]  # with an empty shard and an empty text
WORDS = ("hello world", "a text of some length", "one more sentence", "and then another")


def write_train_and_valid(folder: Path) -> Path:
    """Write datasets of different texts into the folders `train` and `valid`; return the folder."""
    for name, first in (("train", 0), ("valid", 200)):
        texts = [
            ". ".join(f"{WORDS[(number * index + index) % len(WORDS)]} number {number}" for index in range(40))
            for number in range(first, first + 20)
        ]
        write_text_dataset(folder / name, [texts])
    return folder
