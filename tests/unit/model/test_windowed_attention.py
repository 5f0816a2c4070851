"""Attention that skips keys of negligible weight: the same result with fewer products, and the bound behind it."""

import math

import pytest
import torch

from megatron_bipe.config import ModelConfig
from megatron_bipe.model import attention
from megatron_bipe.model.attention import Attention, causal_attention, windowed_attention
from megatron_bipe.model.positions.bias import KeyBias
from megatron_bipe.model.positions.functional import BILEVEL_ALIBI_FACTOR, alibi_slopes
from megatron_bipe.model.positions.rotary import Rotary
from megatron_bipe.model.transformer import LocalLayers
from tests.helpers.attention import attend as attend_with

TOKENS, HEADS, WIDTH = 1100, 6, 16  # not a multiple of a chunk
SLOPES = torch.tensor(alibi_slopes(HEADS)) * BILEVEL_ALIBI_FACTOR


def heads(scale=1.0, groups=HEADS, sequences=2, tokens=TOKENS):
    generator = torch.Generator().manual_seed(groups)
    return [
        scale * torch.randn(sequences, count, tokens, WIDTH, generator=generator) for count in (HEADS, groups, groups)
    ]


def segment_counts(*lengths, tokens=TOKENS):
    return torch.stack([torch.arange(tokens) // length for length in lengths])


@pytest.fixture
def areas(monkeypatch):
    """Record heads x queries x keys of every call of torch's kernel."""
    seen = []

    def watched(q, k, v, mask=None):
        seen.append(q.shape[1] * q.shape[2] * k.shape[2])
        return causal_attention(q, k, v, mask)

    monkeypatch.setattr(attention, "causal_attention", watched)
    return seen


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("groups", [HEADS, 2])
def test_attention_within_reach_equals_attention_over_all_keys_to_rounding(scale, groups, areas):
    q, k, v = heads(scale, groups)
    positions, encoding = segment_counts(5, 14), KeyBias(SLOPES, WIDTH)
    wide = encoding(q, k, positions)
    got = windowed_attention(*wide, v, positions, encoding.reach(q, k))
    # Measured: 6e-7 to 1.9e-6 of the largest value, all of it due to the kernel's order of additions.
    torch.testing.assert_close(got, causal_attention(*wide, v), rtol=0, atol=1e-5 * scale)
    full = HEADS * TOKENS * TOKENS
    assert sum(areas) < (0.75 if scale < 3.0 else 1.0) * full


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_keys_beyond_reach_have_less_total_weight_than_fp32_resolves(scale):
    q, k, _ = heads(scale)
    positions = segment_counts(3, 14)
    reach = KeyBias(SLOPES, WIDTH).reach(q, k)
    distance = positions[:, None, :, None] - positions[:, None, None, :]
    scores = q.double() @ k.double().mT / math.sqrt(WIDTH) - SLOPES.double()[:, None, None] * distance
    weights = scores.masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), -math.inf).softmax(dim=-1)
    beyond = distance > reach[:, None, None]
    assert beyond.any(dim=-1).any(dim=-1).any(dim=0).sum() >= (2 if scale == 3.0 else 4)
    assert (weights * beyond).sum(dim=-1).max() < 2.0**-24


def test_reach_holds_for_a_query_that_prefers_one_distant_key():
    q, k, v = heads(sequences=1)
    query, liked = 3 * attention.CHUNK, 3 * attention.CHUNK - 300
    q[..., query, :], k[..., liked : query + 1, :], k[..., liked, :] = 4.0, -4.0, 4.0  # 128 nats above its own
    positions, encoding = segment_counts(1), KeyBias(SLOPES, WIDTH)
    wide = encoding(q, k, positions)
    got = windowed_attention(*wide, v, positions, encoding.reach(q, k))
    torch.testing.assert_close(got, causal_attention(*wide, v), rtol=0, atol=2e-5)
    flattest = SLOPES.argmin()
    torch.testing.assert_close(got[0, flattest, query], v[0, flattest, liked])  # the query attends to that key


def test_nan_scores_stay_nan():
    q, k, v = heads(sequences=1)
    k[0, 2, 600] = math.nan
    positions, encoding = segment_counts(14), KeyBias(SLOPES, WIDTH)
    got = windowed_attention(*encoding(q, k, positions), v, positions, encoding.reach(q, k))
    assert got[0, 2, 600:].isnan().any()
    assert got[0, 1].isfinite().all()


def attend(encoding, tokens, **settings):
    torch.manual_seed(0)
    config = ModelConfig(
        encoding=encoding, num_layers=1, hidden_size=64, num_heads=4, ffn_size=8, vocab_size=10, **settings
    )
    layer = Attention(config, LocalLayers())
    hidden, positions = torch.randn(1, tokens, 64), segment_counts(14, tokens=tokens)
    return attend_with(layer, hidden, positions)


@pytest.mark.parametrize("encoding", ["bipe_alibi", "alibi"])
@pytest.mark.parametrize("log_scale", [False, True])
def test_long_sequences_skip_keys_if_no_gradients_are_needed(encoding, log_scale, areas):
    tokens = attention.MIN_WINDOWED_TOKENS
    full = attend(encoding, tokens, log_scale=log_scale).detach()
    with torch.no_grad():
        short = attend(encoding, tokens - 1, log_scale=log_scale)
        assert areas == [4 * tokens**2, 4 * (tokens - 1) ** 2]
        areas.clear()
        torch.testing.assert_close(attend(encoding, tokens, log_scale=log_scale), full, rtol=0, atol=1e-5)
    torch.testing.assert_close(short, full[:, :-1], rtol=0, atol=1e-5)
    assert len(areas) > 1
    assert sum(areas) < 0.6 * 4 * tokens**2


def test_encodings_without_a_bound_use_all_keys(areas):
    with torch.no_grad():
        attend("bipe_rope", attention.MIN_WINDOWED_TOKENS)
    assert areas == [4 * attention.MIN_WINDOWED_TOKENS**2]
    config = ModelConfig(encoding="rope", num_layers=1, hidden_size=64, num_heads=4, ffn_size=8, vocab_size=10)
    assert Rotary(config, LocalLayers()).reach(*heads()[:2]) is None
