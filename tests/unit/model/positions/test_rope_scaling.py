"""Every type of RoPE scaling against transformers' own functions."""

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_bipe.config import ModelConfig, RopeScaling
from megatron_bipe.model.positions.rotary import Rotary, rotary_frequencies
from megatron_bipe.model.transformer import LocalLayers

TRAINED = 1024
WIDTHS, BASES, FACTORS = (16, 64, 128), (500.0, 10_000.0, 1e6), (1.5, 4.0, 16.0)


def ours(head_width, base, seq_len_tokens=TRAINED, **scaling):
    config = ModelConfig(
        encoding="rope", hidden_size=2 * head_width, num_heads=2, rope_base=base, train_len_tokens=TRAINED
    )
    return rotary_frequencies(config.model_copy(update={"rope_scaling": RopeScaling(**scaling)}), seq_len_tokens)


def theirs(head_width, base, seq_len_tokens=None, max_positions=TRAINED, **parameters):
    config = LlamaConfig(
        hidden_size=2 * head_width,
        num_attention_heads=2,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_theta": base, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=seq_len_tokens)


def check(found, expected):
    frequencies, factor = expected
    torch.testing.assert_close(found[0], frequencies, rtol=2e-6, atol=0)  # fp32 rounding; the largest seen: 1.1e-6
    assert found[1] == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(("width", "base", "factor"), itertools.product(WIDTHS, BASES, FACTORS))
def test_linear_equals_transformers(width, base, factor):
    found = ours(width, base, type="linear", factor=factor)
    check(found, theirs(width, base, rope_type="linear", factor=factor))
    assert found[0][0] == pytest.approx(1 / factor)


@pytest.mark.parametrize("seq_len_tokens", [TRAINED, TRAINED + 1, 5000])
@pytest.mark.parametrize(("width", "base", "factor"), itertools.product(WIDTHS, BASES, FACTORS))
def test_dynamic_equals_transformers(width, base, factor, seq_len_tokens):
    found = ours(width, base, seq_len_tokens, type="dynamic", factor=factor)
    check(found, theirs(width, base, seq_len_tokens, rope_type="dynamic", factor=factor))


@pytest.mark.parametrize("seq_len_tokens", [299, 300, 301, 5000])
def test_dynamic_of_another_original_length_equals_transformers(seq_len_tokens):
    found = ours(64, 10_000.0, seq_len_tokens, type="dynamic", factor=4.0, original_positions=300)
    check(found, theirs(64, 10_000.0, seq_len_tokens, 300, rope_type="dynamic", factor=4.0))


@pytest.mark.parametrize(("width", "base", "factor"), itertools.product(WIDTHS, BASES, (2.0, 4.0, 16.0)))
def test_ntk_equals_transformers_dynamic_type_where_that_stretches_by_the_factor(width, base, factor):
    """Transformers has no fixed type. Its dynamic factor is factor x length / trained - (factor - 1)."""
    seq_len_tokens = int(TRAINED * (2 * factor - 1) / factor)
    found = ours(width, base, type="ntk", factor=factor)
    check(found, theirs(width, base, seq_len_tokens, rope_type="dynamic", factor=factor))
    assert found[0][0] == 1 and found[0][-1] * factor == pytest.approx(float(base ** -(1 - 2 / width)), rel=1e-5)


YARN = [{}, {"beta_fast": 20.0, "beta_slow": 2.0}, {"attention_factor": 1.5}]


@pytest.mark.parametrize("more", YARN)
@pytest.mark.parametrize("original", [None, 75, 4096])
@pytest.mark.parametrize(("width", "base", "factor"), itertools.product(WIDTHS, BASES, FACTORS))
def test_yarn_equals_transformers(width, base, factor, original, more):
    found = ours(width, base, type="yarn", factor=factor, original_positions=original, **more)
    length = original or TRAINED
    check(
        found,
        theirs(width, base, rope_type="yarn", factor=factor, original_max_position_embeddings=length, **more),
    )


def test_yarn_keeps_fast_pairs_stretches_slow_ones_and_sharpens_scores():
    plain = rotary_frequencies(ModelConfig(encoding="rope"), TRAINED)[0]
    scaling = RopeScaling(type="yarn", factor=16.0)
    config = ModelConfig(encoding="rope", rope_scaling=scaling)
    frequencies, factor = rotary_frequencies(config, 4096)
    turns = plain * TRAINED / (2 * math.pi)
    assert torch.equal(frequencies[turns > 40], plain[turns > 40])
    torch.testing.assert_close(frequencies[turns < 0.8], plain[turns < 0.8] / 16)
    (cos, sin), _ = Rotary(config, LocalLayers()).prepare(torch.arange(8)[None], torch.float32)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, factor**2))
    assert factor == pytest.approx(0.1 * math.log(16) + 1)
