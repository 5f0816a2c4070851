"""Small datasets and models that evaluation tests share."""

import numpy as np
import pytest

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import TokenizerRecord
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.eval.subject import Subject
from megatron_bipe.model.plan import build_model

VOCAB = 40
FINGERPRINT = "a" * 64
NEWLINE = SegmentRule(spec="newline", token_ids=(13,))


@pytest.fixture
def make_dataset(tmp_path, write_dataset):
    """Makes a TokenDataset of two shards from lists of ids; each token stands for 3 bytes of text."""

    def make(documents, rule=NEWLINE, name="corpus", vocab_size=VOCAB, fingerprint=FINGERPRINT):
        half = len(documents) // 2
        tokenizer = TokenizerRecord(name="test", fingerprint=fingerprint, vocab_size=vocab_size, special_ids={})
        shards = [documents[:half], documents[half:]]
        write_dataset(tmp_path / name, shards, rule=rule, vocab_size=vocab_size, tokenizer=tokenizer)
        return TokenDataset(tmp_path / name)

    return make


@pytest.fixture
def documents():
    """Six documents of 173 tokens together, about every eighth token a newline."""
    generator = np.random.default_rng(0)
    result = []
    for size in (31, 1, 60, 12, 40, 29):
        tokens = generator.integers(14, VOCAB, size)
        tokens[generator.random(size) < 0.12] = 13
        result.append(tokens)
    return result


@pytest.fixture
def make_subject():
    """Maker of a Subject whose weights are large enough for positions to matter."""

    def make(encoding="bipe_rope", rule=NEWLINE, fingerprint=FINGERPRINT, name="tiny", **changes):
        values = {
            "encoding": encoding,
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "ffn_size": 48,
            "vocab_size": VOCAB,
            "intra_size": 6,
            "train_len_tokens": 16,
            "init_std": 0.2,
        }
        config = ModelConfig(**values | changes)
        return Subject(name, f"runs/{name}", build_model(config, seed=3), config, fingerprint, rule)

    return make
