"""Sequences of random tokens for comparing two models without data."""

import numpy as np
import torch
from megatron_bipe.hf.parity import SampleBatch

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.data.segments import SegmentRule, bilevel_ids, segment_ends, sequence_ends

SEPARATOR_SHARE = 0.08  # about the share in the training data of the published models


def random_sequences(config: ModelConfig, rule: SegmentRule, seq_len_tokens: int, rows: int = 2) -> SampleBatch:
    """Return fixed tokens, intra ids and inter ids [rows, seq_len], with separators as frequent as in text."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, config.vocab_size, (rows, seq_len_tokens))
    separators = [token for token in rule.token_ids if token < config.vocab_size]
    if separators:
        chosen = generator.random(tokens.shape) < SEPARATOR_SHARE
        tokens = np.where(chosen, generator.choice(separators, tokens.shape), tokens)
    ends = np.broadcast_to(segment_ends(tokens, rule), tokens.shape)  # fixed:N gives one row for all
    intra, inter = bilevel_ids(sequence_ends(ends, rule), config.intra_clip)
    return torch.from_numpy(tokens), torch.from_numpy(intra), torch.from_numpy(inter)
