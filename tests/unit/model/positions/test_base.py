"""XPOS, T5's bias and NoPE against plain formulas in float64, and tables that all blocks share."""

import gc
import math

import pytest
import torch

from megatron_bipe.config import ModelConfig
from megatron_bipe.config.encodings import RELATIVE
from megatron_bipe.model.attention import Attention, causal_attention
from megatron_bipe.model.positions.base import RelativeEncoding, make_relative
from megatron_bipe.model.transformer import LocalLayers, build_model
from tests.helpers.attention import attend as attend_with

HEADS, WIDTH, TRAINED = 2, 8, 64


def config_of(encoding, **changes):
    shape = {"num_layers": 3, "hidden_size": HEADS * WIDTH, "num_heads": HEADS, "ffn_size": 24, "vocab_size": 20}
    return ModelConfig(**{**shape, "encoding": encoding, "train_len_tokens": TRAINED, "init_std": 0.5, **changes})


def heads(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, HEADS, num_tokens, WIDTH, generator=generator) for _ in range(3)]


def softmax_of(score, v):
    """Return causal attention in float64, computed score by score."""
    mixed = torch.zeros(v.shape, dtype=torch.float64)
    for head in range(v.shape[1]):
        for t in range(v.shape[2]):
            scores = torch.tensor([score(head, t, s) for s in range(t + 1)], dtype=torch.float64)
            mixed[0, head, t] = scores.softmax(0) @ v[0, head, : t + 1].double()
    return mixed


def attend(encoding, q, k, v, positions):
    prepared = encoding.prepare(positions, q.dtype)
    return causal_attention(*encoding.encode(q, k, prepared), v, encoding.score_bias(prepared))


def token_positions(num_tokens):
    return torch.arange(num_tokens)[None]


@pytest.mark.parametrize("positions", [token_positions(40), token_positions(40) * 37 // 4, token_positions(40) // 5])
def test_xpos_scores_are_those_of_rope_with_decay_by_distance(positions):
    q, k, v = heads(40)
    position_ids = positions[0].tolist()

    def score(head, t, s):
        total, half = 0.0, WIDTH // 2
        for i in range(half):
            angle = (position_ids[t] - position_ids[s]) * 10_000.0 ** (-2 * i / WIDTH)
            fade = ((2 * i / WIDTH + 0.4) / 1.4) ** ((position_ids[t] - position_ids[s]) / 512)
            a, b = q[0, head, t, [i, i + half]].tolist(), k[0, head, s, [i, i + half]].tolist()
            total += fade * (
                (a[0] * b[0] + a[1] * b[1]) * math.cos(angle) + (a[0] * b[1] - a[1] * b[0]) * math.sin(angle)
            )
        return total / math.sqrt(WIDTH)

    found = attend(make_relative(config_of("xpos"), LocalLayers()), q, k, v, positions)
    torch.testing.assert_close(found.double(), softmax_of(score, v), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xpos_longest_sequence_stays_in_range_forward_and_backward(dtype):
    positions = token_positions(RELATIVE["xpos"].max_seq_len_tokens)[:, -40:]
    q, k, v = (x.to(dtype).requires_grad_() for x in heads(40))
    grown, shrunk = (x.detach() for x in make_relative(config_of("xpos"), LocalLayers())(q, k, positions))
    assert grown[grown != 0].abs().min() > 1e-22 and shrunk.abs().max() < 1e19  # fp32 and bf16: 1.2e-38 to 3.4e38
    near = attend(make_relative(config_of("xpos"), LocalLayers()), q, k, v, token_positions(40))
    far = attend(make_relative(config_of("xpos"), LocalLayers()), q, k, v, positions)
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(far, near, atol=tolerance, rtol=0)  # scores know differences of positions alone
    wanted = torch.autograd.grad(near.float().square().sum(), (q, k, v))
    for found, expected in zip(torch.autograd.grad(far.float().square().sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=4 * tolerance, rtol=4 * tolerance)


def bucket(distance):
    """Return T5's decoder bucket: 0 to 15 exact, then 16 logarithmic ones up to 128."""
    if distance < 16:
        return distance
    return min(31, 16 + int(math.log(distance / 16) / math.log(128 / 16) * 16))


@pytest.mark.parametrize("encoding", ["t5", "bipe_t5"])
@pytest.mark.parametrize("stride", [1, 5])
def test_t5_scores_have_the_bias_of_their_bucket(encoding, stride):
    num_tokens = 60
    positions = token_positions(num_tokens) * stride
    q, k, v = heads(num_tokens)
    t5 = make_relative(config_of(encoding), LocalLayers())
    torch.nn.init.normal_(t5.table.weight)
    table = t5.table.weight.tolist()

    def score(head, t, s):
        exact = float(q[0, head, t].double() @ k[0, head, s].double()) / math.sqrt(WIDTH)
        return exact + table[bucket((t - s) * stride)][head]

    torch.testing.assert_close(
        attend(t5, q, k, v, positions).detach().double(), softmax_of(score, v), atol=2e-6, rtol=0
    )


def test_bilevel_t5_bias_of_each_sequence_follows_its_own_segments():
    torch.manual_seed(0)
    attention = Attention(config_of("bipe_t5"), LocalLayers())
    hidden, segments = torch.randn(2, 30, HEADS * WIDTH), torch.stack((torch.arange(30) // 3, torch.arange(30) // 11))
    together = attend_with(attention, hidden, segments)
    for row in range(2):
        one = slice(row, row + 1)
        torch.testing.assert_close(together[one], attend_with(attention, hidden[one], segments[one]))
    assert not torch.allclose(together[:1], attend_with(attention, hidden[:1], segments[1:]), atol=1e-3)


def test_nope_scores_ignore_positions():
    q, k, v = heads(30)

    def score(head, t, s):
        return float(q[0, head, t].double() @ k[0, head, s].double()) / math.sqrt(WIDTH)

    found = attend(make_relative(config_of("nope"), LocalLayers()), q, k, v, token_positions(30) * 9)
    torch.testing.assert_close(found.double(), softmax_of(score, v), atol=2e-6, rtol=0)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("encoding", ["bipe_rope", "alibi", "xpos", "bipe_t5"])
def test_rotary_tables_are_prepared_once_for_all_blocks_and_follow_the_positions(encoding, recompute, monkeypatch):
    model = build_model(config_of(encoding), recompute=recompute)
    kind, prepared = type(model[1].attention.encoding), []
    plain = kind.prepare
    monkeypatch.setattr(kind, "prepare", lambda self, *args: prepared.append(plain(self, *args)) or prepared[-1])
    for sequences in (1, 2):
        position_ids = torch.arange(24).expand(2, 24)
        model((position_ids % 20, position_ids % 5, position_ids // 5)).sum().backward()
        assert len(prepared) == sequences
    del position_ids
    tables = model[1]._prepared_positions._of
    gc.collect()
    assert len(tables) == 0


def test_relative_encoding_alone_changes_nothing():
    q, k, _ = heads(5)
    encoding = RelativeEncoding(config_of("nope"), LocalLayers())
    assert encoding(q, k, token_positions(5)) == (q, k) and encoding.score_bias(None) is None
