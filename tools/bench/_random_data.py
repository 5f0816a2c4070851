"""A dataset of random tokens for benchmarks, with separators as frequent as in the authors' data."""

from pathlib import Path

import numpy as np

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import Manifest, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule, segment_ends
from megatron_bipe.data.shard import ShardWriter, choose_dtype
from megatron_bipe.types import TokenizedDocument

VOCAB_SIZE, SEPARATOR, SEGMENT_LENGTH = 32000, 13, 13.7  # of the authors' rule on PG-19: mean segment 13.7 tokens
DOCUMENT_TOKENS, NUM_SHARDS = 1500, 4


def make_dataset(folder: Path, num_tokens: int) -> TokenDataset:
    """Write at least so many tokens, in whole documents and equal shards."""
    generator = np.random.default_rng(0)
    rule = SegmentRule(spec="newline", token_ids=(SEPARATOR,))
    dtype = choose_dtype(VOCAB_SIZE)
    records = []
    for number in range(NUM_SHARDS):
        with ShardWriter(folder, f"bench-{number:05d}", dtype) as writer:
            while writer.num_tokens < num_tokens // NUM_SHARDS:
                tokens = generator.integers(SEPARATOR + 1, VOCAB_SIZE, DOCUMENT_TOKENS).astype(dtype)
                tokens[generator.random(DOCUMENT_TOKENS) < 1 / SEGMENT_LENGTH] = SEPARATOR
                writer.add(TokenizedDocument(tokens, segment_ends(tokens, rule), DOCUMENT_TOKENS, ""))
            records.append(writer.finish())
    tokenizer = TokenizerRecord(name="none", fingerprint="0" * 64, vocab_size=VOCAB_SIZE, special_ids={})
    manifest = Manifest(tokenizer=tokenizer, rule=rule, dtype="uint16", shards=tuple(records), source={})
    manifest.save(folder)
    return TokenDataset(folder)
