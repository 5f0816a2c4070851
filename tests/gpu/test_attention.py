"""Fused attention: its error for every head width of the recipes, with the channels of a key bias, and grouped."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_bipe.config import ModelConfig
from megatron_bipe.model.attention import causal_attention
from megatron_bipe.model.positions.base import make_relative
from megatron_bipe.model.positions.bias import KeyBias
from megatron_bipe.model.transformer import LocalLayers

HEADS, TOKENS = 4, {"cuda": 1024, "cpu": 128}
ROUNDING = 4e-3  # relative error of a kernel in bf16 without bias: 2.9e-3 was measured on a CPU
FUSED = {
    "cuda": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "cpu": [SDPBackend.FLASH_ATTENTION],
}


@pytest.fixture
def inputs(device):
    """Return a function that draws queries, keys and values in bf16."""
    generator = torch.Generator().manual_seed(0)

    def draw(width, key_heads=HEADS):
        tokens = TOKENS[device.type]
        shapes = [(2, heads, tokens, width) for heads in (HEADS, key_heads, key_heads)]
        return [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes]

    return draw


def _error(got, q, k, v, bias=0.0):
    scores = q.double() @ k.double().mT / math.sqrt(v.shape[-1]) + bias
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    exact = scores.masked_fill(future, -math.inf).softmax(-1) @ v.double()
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("width", [64, 72, 80, 128, 136, 144])
def test_fused_kernel_exists_for_the_head_width_and_is_exact(inputs, device, width):
    q, k, v = (x.requires_grad_() for x in inputs(width))
    with sdpa_kernel(FUSED[device.type]):  # raises if none of them takes this width
        mixed = causal_attention(q, k, v)
        mixed.float().square().sum().backward()
    assert _error(mixed.detach(), q.detach(), k.detach(), v.detach()) < ROUNDING
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, v))


@pytest.mark.parametrize("encoding", ["alibi", "bipe_alibi"])
@pytest.mark.parametrize("width", [64, 128])
def test_key_bias_in_bf16_is_as_exact_as_the_kernel_without_bias(inputs, device, width, encoding):
    q, k, v = inputs(width)
    config = ModelConfig(encoding=encoding, hidden_size=HEADS * width, num_heads=HEADS)
    key_bias = make_relative(config, LocalLayers())
    assert isinstance(key_bias, KeyBias)
    tokens, generator = q.shape[2], torch.Generator().manual_seed(1)
    segments = (torch.rand(2, tokens, generator=generator) < 0.1).long().cumsum(-1)
    positions = (segments if config.bilevel else torch.arange(tokens).expand(2, -1)).to(device)
    slopes = key_bias.slopes_N.double().to(device) / math.sqrt(width)
    bias = slopes[None, :, None, None] * positions[:, None, None, :].double()
    biased = causal_attention(*key_bias(q, k, positions), v)
    assert _error(biased, q, k, v, bias) < 1.5 * _error(causal_attention(q, k, v), q, k, v)


@pytest.mark.parametrize("width", [64, 144])
def test_grouped_heads_give_the_result_of_repeated_ones(inputs, width):
    q, k, v = inputs(width, key_heads=2)
    grouped, repeated = (x.repeat_interleave(HEADS // 2, dim=1) for x in (k, v)), causal_attention(q, k, v)
    found = causal_attention(q, *grouped)
    assert float((found.float() - repeated.float()).norm() / repeated.float().norm()) < ROUNDING
