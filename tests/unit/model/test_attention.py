"""Attention against a materialised float64 computation, and a check that it materialises no scores itself."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_bipe.config import ModelConfig
from megatron_bipe.model.attention import Attention, causal_attention
from megatron_bipe.model.positions.bias import KeyBias
from megatron_bipe.model.positions.functional import alibi_slopes
from megatron_bipe.model.transformer import LocalLayers, build_model
from tests.helpers.attention import attend

ENCODINGS = ["rope", "bipe_rope", "alibi", "bipe_alibi"]
HEAD_WIDTH = 16


def small_config(**changes):
    values = {
        "encoding": "bipe_alibi",
        "hidden_size": 32,
        "num_heads": 4,
        "vocab_size": 50,
        "num_layers": 2,
        "ffn_size": 48,
        "intra_size": 32,
        "train_len_tokens": 64,
    }
    return ModelConfig(**values | changes)


def random_heads(num_heads, num_tokens, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_heads * num_tokens)
    return [torch.randn(1, num_heads, num_tokens, width, generator=generator).to(dtype) for _ in range(3)]


def positions_of(encoding, num_tokens):
    """Return token positions for alibi, and segment ids with a mean length of ten tokens for bipe_alibi."""
    if encoding == "alibi":
        return torch.arange(num_tokens)[None]
    generator = torch.Generator().manual_seed(num_tokens)
    return (torch.rand(1, num_tokens, generator=generator) < 0.1).long().cumsum(-1)


def exact_attention(q, k, v, slopes=None, positions=None):
    """Return causal softmax attention in float64 with the full score matrix; ALiBi as -slope x distance."""
    num_tokens = q.shape[2]
    scores = q.double() @ k.double().mT / math.sqrt(v.shape[-1])
    if slopes is not None:
        distance = positions[:, :, None] - positions[:, None, :]
        scores = scores - slopes.double()[None, :, None, None] * distance[:, None].double()
    future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v.double()


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize(("encoding", "factor"), [("alibi", 1.0), ("bipe_alibi", 96.0)])
@pytest.mark.parametrize("num_heads", range(1, 17))
def test_key_bias_attention_fp32_equals_materialised_alibi(num_heads, encoding, factor):
    q, k, v = random_heads(num_heads, 200, HEAD_WIDTH)
    positions = positions_of(encoding, 200)
    slopes = torch.tensor(alibi_slopes(num_heads)) * factor
    got = causal_attention(*KeyBias(slopes, HEAD_WIDTH)(q, k, positions), v)
    # Measured: up to 5.1e-6 (bipe_alibi) and 1.1e-6 (alibi); 4e-4 and 5e-5 with slopes in one bf16 part.
    assert relative_error(got, exact_attention(q, k, v, slopes, positions)) < 2e-5


@pytest.mark.parametrize(("encoding", "factor"), [("alibi", 1.0), ("bipe_alibi", 96.0)])
@pytest.mark.parametrize("num_tokens", [1024, 2048])
def test_key_bias_attention_bf16_errs_no_more_than_plain_attention(encoding, factor, num_tokens):
    q, k, v = random_heads(4, num_tokens, 64, torch.bfloat16)
    positions = positions_of(encoding, num_tokens)
    slopes = torch.tensor(alibi_slopes(4)) * factor
    plain = relative_error(causal_attention(q, k, v), exact_attention(q, k, v))

    got = causal_attention(*KeyBias(slopes, 64)(q, k, positions), v)

    # Measured at 1024 and 4096 tokens, 12 and 16 heads: 0.81 to 0.94 of plain attention's 2.0e-3.
    assert relative_error(got, exact_attention(q, k, v, slopes, positions)) < 1.25 * plain


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3.3e-3), (torch.float32, 3e-5)])
def test_key_bias_attention_error_is_no_larger_in_the_middle_of_a_long_sequence(dtype, bound):
    q, k, v = random_heads(2, 8192, 64, dtype)
    positions, slopes = torch.arange(8192)[None] // 14, torch.tensor([alibi_slopes(12)[0], 2**-0.5]) * 96.0
    got = causal_attention(*KeyBias(slopes, 64)(q, k, positions), v)
    queries = torch.linspace(0, 8191, 64).long()
    scores = q[:, :, queries].double() @ k.double().mT / 8.0
    scores += slopes.double()[:, None, None] * (positions - positions[:, queries].T)
    weights = scores.masked_fill(torch.arange(8192) > queries[:, None], -torch.inf).softmax(dim=-1)
    # Measured in bf16: 2.6e-3, as plain attention (2.9e-3), in fp32 1.3e-5; without the query's own channel 3.9e-3 and
    # 1.6e-3, with the channels after the head's own 3.6e-3 and 1.6e-3. With AMX: 2.8e-3, as plain attention, and 5.8e-3
    # without the zeros between the channels.
    errors = (got[:, :, queries].double() - weights @ v.double()).norm(dim=-1) / (weights @ v.double()).norm(dim=-1)
    assert errors.max() < bound


def tensor_core_scores(q_QE, k_SE):
    """Return q k^T as tensor cores add it: 16 products and the sum so far are cut to 2 bits below fp32's last one."""
    sums = torch.zeros(len(q_QE), len(k_SE), dtype=torch.float64)
    for first in range(0, q_QE.shape[1], 16):
        products = q_QE[:, None, first : first + 16].double() * k_SE[None, :, first : first + 16].double()
        terms = torch.cat([sums[..., None], products], dim=-1)
        largest = terms.abs().amax(dim=-1, keepdim=True).clamp(min=2.0**-100)
        unit = 2.0 ** (largest.log2().floor() - 25)
        sums = ((terms / unit).trunc() * unit).sum(dim=-1).float().double()
    return sums


def test_key_bias_scores_on_tensor_cores_are_exact_for_the_first_queries_of_a_long_sequence():
    num_tokens, queries, slope = 8192, torch.arange(40, 200, 16), 2**-0.5 * 96.0
    q, k, v = (x[0, 0] for x in random_heads(1, num_tokens, 64, torch.bfloat16))
    positions = torch.arange(num_tokens)[None] // 14
    wide_q, wide_k = (x[0, 0] for x in KeyBias(torch.tensor([slope]), 64)(q[None, None], k[None, None], positions))
    k, v, wide_k = k[:200], v[:200].double(), wide_k[:200]
    later = torch.arange(200) > queries[:, None]
    distances = positions[0, :200] - positions[0, queries, None]
    exact = q[queries].double() @ k.double().T / 8 + torch.tensor(slope).double() * distances
    want, got = (
        scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ v
        for scores in (exact, tensor_core_scores(wide_q[queries], wide_k) / 8)
    )
    # Measured: 6.9e-6, and 1.2e-3 with two products of the head in the group of the channels.
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).max() < 2e-5


def test_key_bias_attention_gradients_equal_materialised_alibi():
    heads = [x.requires_grad_() for x in random_heads(4, 120, HEAD_WIDTH)]
    q, k, v = heads
    positions = positions_of("bipe_alibi", 120)
    slopes = torch.tensor(alibi_slopes(4)) * 96.0
    weights = torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad((exact_attention(q, k, v, slopes, positions) * weights).sum(), heads)

    mixed = causal_attention(*KeyBias(slopes, HEAD_WIDTH)(q, k, positions), v)
    found = torch.autograd.grad((mixed * weights).sum(), heads)

    for got, want in zip(found, wanted, strict=True):
        assert relative_error(got, want.double()) < 2e-5  # measured: 3e-6


class _LargestResult(TorchDispatchMode):
    """Record of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements, self.operation = 0, ""
        self.of_views = []  # shapes of zero-filled gradients of views, which are then added up

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if str(func.overloadpacket) in ("aten.select_backward", "aten.slice_backward"):
            self.of_views.append(result.shape)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self.elements:
                self.elements, self.operation = leaf.numel(), str(func)
        return result


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_attention_forward_and_backward_run_on_flash_and_make_nothing_of_size_t_squared(encoding, kv_heads):
    num_tokens = 512
    attention = Attention(small_config(encoding=encoding, num_kv_heads=kv_heads), LocalLayers())
    hidden = torch.randn(1, num_tokens, 32, requires_grad=True)
    with _LargestResult() as largest, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attend(attention, hidden, positions_of("bipe_alibi", num_tokens)).sum().backward()
    assert 0 < largest.elements < num_tokens**2, largest.operation


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_attention_grouped_queries_equal_repeated_key_and_value_heads(encoding):
    torch.manual_seed(0)
    grouped = Attention(small_config(encoding=encoding, num_kv_heads=2), LocalLayers())
    full = Attention(small_config(encoding=encoding), LocalLayers())
    with torch.no_grad():
        groups = grouped.qkv.weight.unflatten(0, (2, 4, 8))  # 2 groups of (2 queries, key, value), 8 rows per head
        per_head = [torch.stack((group[query], group[2], group[3])) for group in groups for query in (0, 1)]
        full.qkv.weight.copy_(torch.stack(per_head).flatten(0, 2))
        full.out.weight.copy_(grouped.out.weight)
    hidden = torch.randn(2, 70, 32)
    positions = positions_of("bipe_alibi", 70).expand(2, -1)
    torch.testing.assert_close(
        attend(grouped, hidden, positions), attend(full, hidden, positions), atol=1e-6, rtol=1e-5
    )


def test_attention_log_scale_multiplies_queries_by_the_growth_of_the_logarithm():
    torch.manual_seed(0)
    plain = Attention(small_config(num_heads=2, encoding="rope"), LocalLayers())
    scaled = Attention(small_config(num_heads=2, encoding="rope", log_scale=True), LocalLayers())
    scaled.load_state_dict(plain.state_dict())
    hidden, positions = torch.randn(1, 100, 32), torch.arange(100)[None]
    q, k, v = plain.qkv(hidden).unflatten(-1, (2, 3, HEAD_WIDTH)).unbind(3)
    q, k = plain.encoding(q.transpose(1, 2), k.transpose(1, 2), positions)
    growth = torch.log(positions[0] + 1.0) / math.log(64)
    mixed = exact_attention(q * growth[:, None], k, v.transpose(1, 2))
    want = plain.out(mixed.float().transpose(1, 2).flatten(2))

    torch.testing.assert_close(attend(scaled, hidden, positions), want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(attend(plain, hidden, positions), want, atol=1e-3)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("log_scale", [False, True])
def test_model_changing_a_later_token_changes_no_earlier_logit(encoding, log_scale):
    model = build_model(small_config(encoding=encoding, init_std=0.2, log_scale=log_scale, num_kv_heads=2))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (2, 96), generator=generator)
    inter = positions_of("bipe_alibi", 96).expand(2, -1)
    intra = torch.arange(96).expand(2, -1) % 32
    changed_at = 61
    other_tokens, other_inter = tokens.clone(), inter.clone()
    other_tokens[:, changed_at] = (tokens[:, changed_at] + 7) % 50
    other_inter[:, changed_at + 1 :] += 1  # as if the changed token ended a segment
    with torch.no_grad():
        before, after = model((tokens, intra, inter)), model((other_tokens, intra, other_inter))
    torch.testing.assert_close(before[:, :changed_at], after[:, :changed_at], atol=1e-4, rtol=0)
    assert (before[:, changed_at:] - after[:, changed_at:]).abs().max() > 0.1


def indexed_heads(layer, qkv_BTF):
    """Return this rank's queries, keys and values [B, T, heads, H] by indexing a projection."""
    x = qkv_BTF.unflatten(-1, (-1, layer.parts * layer.queries_per_group + 2, layer.head_width))
    found = []
    for number in layer.own_groups:
        group, part = divmod(number, layer.parts)
        first = part * layer.queries_per_group
        queries = x[:, :, group, first : first + layer.queries_per_group]
        found.append((queries, x[:, :, group, -2][:, :, None], x[:, :, group, -1][:, :, None]))
    return [torch.cat(kind, dim=2).transpose(1, 2) for kind in zip(*found, strict=True)]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("kv_heads", "parts"), [(4, 1), (2, 1), (2, 2), (1, 2)])
def test_projection_is_split_into_heads_with_one_gradient_of_full_size(encoding, kv_heads, parts):
    layer = Attention(small_config(encoding=encoding, num_kv_heads=kv_heads), LocalLayers())
    layer.parts, layer.queries_per_group = parts, layer.queries_per_group // parts
    layer.own_groups = range(kv_heads * parts)
    positions = positions_of("bipe_alibi", 40)
    hidden = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(0))

    qkv = layer.qkv(hidden)
    q, k, v = indexed_heads(layer, qkv)
    mixed = causal_attention(*layer.encoding(q, k, positions), v)
    wanted = layer.out(mixed.transpose(1, 2).flatten(2))
    want = torch.autograd.grad(wanted.square().sum(), layer.qkv.weight)

    found = attend(layer, hidden, positions)
    assert torch.equal(found, wanted)
    with _LargestResult() as largest:
        got = torch.autograd.grad(found.square().sum(), layer.qkv.weight)
    assert torch.equal(got[0], want[0])
    assert not [shape for shape in largest.of_views if shape[-2:] == (parts * layer.queries_per_group + 2, 8)]
