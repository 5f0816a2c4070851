"""Relative encodings against transformers' rotary code and against ALiBi's definition."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_bipe.config import ModelConfig, RopeScaling
from megatron_bipe.model.positions.base import make_relative
from megatron_bipe.model.positions.bias import KeyBias
from megatron_bipe.model.positions.functional import alibi_slopes
from megatron_bipe.model.positions.rotary import Rotary, rotary_frequencies
from megatron_bipe.model.transformer import LocalLayers

TRAINED = 32
SCALINGS = {
    "none": (None, {"rope_type": "default"}),
    "linear": (RopeScaling(type="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    "dynamic": (RopeScaling(type="dynamic", factor=2.0), {"rope_type": "dynamic", "factor": 2.0}),
}


def small_config(**changes):
    values = {
        "encoding": "rope",
        "hidden_size": 64,
        "num_heads": 4,
        "vocab_size": 50,
        "num_layers": 1,
        "ffn_size": 64,
        "train_len_tokens": TRAINED,
    }
    return ModelConfig(**values | changes)


def queries_and_keys(num_tokens, heads=4, kv_heads=2, width=16):
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((2, heads, num_tokens, width), (2, kv_heads, num_tokens, width))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("num_tokens", [TRAINED, 4 * TRAINED])
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_rotary_token_positions_equals_transformers(name, num_tokens, base):
    ours, theirs = SCALINGS[name]
    llama = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_theta": base, **theirs},
    )
    q, k = queries_and_keys(num_tokens)
    positions = torch.arange(num_tokens).expand(2, -1)
    want_q, want_k = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(llama)(q, positions))

    got_q, got_k = Rotary(small_config(rope_scaling=ours, rope_base=base), LocalLayers())(q, k, positions)

    # transformers raises the dynamic base in fp32, we in float64; times a position of 127.
    atol = 5e-5 if name == "dynamic" else 2e-6
    torch.testing.assert_close(got_q, want_q, atol=atol, rtol=0)
    torch.testing.assert_close(got_k, want_k, atol=atol, rtol=0)


def test_rotary_segment_positions_equals_transformers():
    q, k = queries_and_keys(40)
    segments = torch.stack((torch.arange(40) // 7, torch.zeros(40, dtype=torch.int64)))
    llama = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=TRAINED)
    want_q, want_k = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(llama)(q, segments))

    got_q, got_k = Rotary(small_config(encoding="bipe_rope"), LocalLayers())(q, k, segments)

    torch.testing.assert_close(got_q, want_q, atol=2e-6, rtol=0)
    torch.testing.assert_close(got_k, want_k, atol=2e-6, rtol=0)


def test_rotary_dynamic_within_training_length_is_unscaled():
    def frequencies(scaling, seq_len_tokens):
        return rotary_frequencies(small_config(rope_scaling=scaling), seq_len_tokens)[0]

    dynamic = SCALINGS["dynamic"][0]
    assert torch.equal(frequencies(dynamic, TRAINED), frequencies(None, TRAINED))
    assert not torch.equal(frequencies(dynamic, TRAINED + 1), frequencies(dynamic, TRAINED))


def test_rotary_angles_are_computed_in_fp32_for_bf16_inputs():
    positions = torch.tensor([[4093]])
    (cos, sin), _ = Rotary(small_config(), LocalLayers()).prepare(positions, torch.bfloat16)
    angles = positions.double() * rotary_frequencies(small_config(), 1)[0].double()
    # bf16 positions would be off by up to 8 radians here; rounding the result costs at most 2^-9.
    torch.testing.assert_close(cos.double().flatten(), angles.cos().flatten(), atol=3e-3, rtol=0)
    torch.testing.assert_close(sin.double().flatten(), angles.sin().flatten(), atol=3e-3, rtol=0)


def test_alibi_slopes_eight_heads_are_powers_of_two():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]


def test_alibi_slopes_twelve_heads_take_every_other_slope_of_sixteen():
    assert alibi_slopes(12) == alibi_slopes(8) + alibi_slopes(16)[0:8:2]


@pytest.mark.parametrize(("encoding", "factor"), [("alibi", 1.0), ("bipe_alibi", 96.0)])
def test_make_relative_alibi_has_the_papers_slope_factor(encoding, factor):
    biased = make_relative(small_config(encoding=encoding), LocalLayers())
    slopes = biased.slopes_N / small_config().head_width ** 0.5
    torch.testing.assert_close(slopes, torch.tensor(alibi_slopes(4)) * factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 300, 5000])
def test_key_bias_channels_hold_slope_times_distance_exactly(dtype, num_tokens):
    slopes = torch.tensor(alibi_slopes(12)) * 96.0
    positions = torch.arange(num_tokens)[None] + 17
    q, k = torch.zeros(1, 12, num_tokens, 16, dtype=dtype), torch.zeros(1, 4, num_tokens, 16, dtype=dtype)
    wide_q, wide_k = KeyBias(slopes, head_width=16)(q, k, positions)

    for query in (0, num_tokens // 2, num_tokens - 1):
        scores = (wide_q[0, :, query, None].double() @ wide_k[0, :1].double().mT).squeeze(1)
        bias = scores / 4.0  # as attention scales, by 1/sqrt(16)

        own = slopes.double() * (positions[0, query] - positions[0, -1])  # what is the same for all keys
        assert (bias[:, query].abs() <= 2**-8 * own.abs()).all()  # so it is small near the query
        want = slopes.double()[:, None] * (positions - positions[:, query, None]).double()
        torch.testing.assert_close(bias - bias[:, query, None], want, rtol=2**-23, atol=0)


@pytest.mark.parametrize("head_width", [8, 12, 16, 64, 80])
def test_key_bias_widened_heads_are_a_multiple_of_eight_and_start_in_a_group_of_sixteen(head_width):
    q, k = queries_and_keys(5, width=head_width)
    wide_q, wide_k = KeyBias(torch.ones(4), head_width)(q, k, torch.arange(5).expand(2, -1))
    assert wide_q.shape[-1] == wide_k.shape[-1] == 16 + (head_width + 7) // 8 * 8
    assert wide_q.shape[1] == 4 and wide_k.shape[1] == 2
    for wide, head in ((wide_q, q), (wide_k, k)):
        assert torch.equal(wide[..., 16 : 16 + head_width], head)
        assert not wide[..., 1:16:2].any() and not wide[..., 14:16].any() and not wide[..., 16 + head_width :].any()
