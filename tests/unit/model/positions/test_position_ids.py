"""Positions that are drawn at random per sequence in training, and spread evenly otherwise."""

import pytest
import torch

from megatron_bipe.config import ModelConfig
from megatron_bipe.model.positions.absolute import evenly_spaced_position_ids, random_position_ids
from megatron_bipe.model.transformer import build_model


def tokens_of(rows, length, seed=0):
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("length", "below"), [(1, 1), (1, 9), (16, 16), (16, 64), (300, 1000)])
def test_random_positions_ascend_without_repetition_below_the_limit(length, below):
    position_ids = random_position_ids(tokens_of(3, length), below, seed=5)
    assert position_ids.shape == (3, length) and position_ids.dtype == torch.int64
    assert (position_ids.diff(dim=1) > 0).all()
    assert position_ids.min() >= 0 and position_ids.max() < below


def test_random_positions_depend_only_on_the_sequence_and_the_seed():
    tokens = tokens_of(4, 32)
    position_ids = random_position_ids(tokens, 128, seed=5)
    assert torch.equal(random_position_ids(tokens[2:3], 128, seed=5), position_ids[2:3])
    others = tokens.flip(1), tokens.index_fill(1, torch.tensor([31]), 51)
    for other in (random_position_ids(tokens, 128, seed=6), *(random_position_ids(x, 128, seed=5) for x in others)):
        assert not (other == position_ids).all(dim=1).any()


def test_random_positions_are_drawn_uniformly():
    """Each of 64 positions is drawn with probability 1/4, within 5 standard deviations over 20,000 sequences."""
    position_ids = random_position_ids(tokens_of(20_000, 16), 64, seed=1)
    shard = position_ids.flatten().bincount(minlength=64) / 20_000
    assert (shard - 0.25).abs().max() < 5 * (0.25 * 0.75 / 20_000) ** 0.5
    gaps = position_ids.diff(dim=1).float()
    assert abs(float(gaps.mean()) - 65 / 17) < 0.03  # mean gap of 16 positions among 64


def test_spread_positions_keep_one_stride_up_to_the_training_length_and_fill_the_range_beyond():
    assert evenly_spaced_position_ids(tokens_of(1, 5), 128, 32)[0].tolist() == [0, 4, 8, 12, 16]
    assert evenly_spaced_position_ids(tokens_of(1, 32), 128, 32)[0].tolist() == list(range(0, 128, 4))
    longer = evenly_spaced_position_ids(tokens_of(2, 100), 128, 32)
    assert (longer.diff(dim=1) > 0).all() and longer[0, 0] == 0 and longer[0, -1] == 126


def test_randomized_model_draws_in_training_and_spreads_otherwise():
    shape = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_size": 8, "vocab_size": 50}
    config = ModelConfig(**shape, encoding="randomized_rope", train_len_tokens=16, position_range=40)
    tokens = tokens_of(2, 16)
    ids = (tokens, torch.zeros_like(tokens), torch.zeros_like(tokens))
    positions = {seed: build_model(config, seed)[0](ids)[1] for seed in (3, 4)}
    for seed, found in positions.items():
        assert torch.equal(found, random_position_ids(tokens, 40, seed))
    assert torch.equal(build_model(config, 3).eval()[0](ids)[1], evenly_spaced_position_ids(tokens, 40, 16))
