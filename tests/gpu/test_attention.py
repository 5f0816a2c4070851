"""The key-bias channels in the GPU's own flash kernels."""

import math

import pytest
import torch

from megatron_bipe.config import ModelConfig
from megatron_bipe.model.attention import causal_attention
from megatron_bipe.model.positions.base import make_relative
from megatron_bipe.model.positions.bias import KeyBias
from megatron_bipe.model.transformer import LocalLayers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
HEADS, TOKENS, WIDTH = 12, 1024, 64


def _error(got, q, k, v, bias):
    scores = q.double() @ k.double().mT / math.sqrt(WIDTH) + bias
    future = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=q.device).triu(1)
    exact = scores.masked_fill(future, -math.inf).softmax(-1) @ v.double()
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("encoding", ["alibi", "bipe_alibi"])
def test_key_bias_in_bf16_is_as_exact_as_the_kernel_without_bias(encoding):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
    config = ModelConfig(encoding=encoding, hidden_size=HEADS * WIDTH, num_heads=HEADS)
    bias_encoding = make_relative(config, LocalLayers())
    assert isinstance(bias_encoding, KeyBias)
    segments = (torch.rand(2, TOKENS, device="cuda") < 0.1).long().cumsum(-1)
    positions = segments if config.bilevel else torch.arange(TOKENS, device="cuda").expand(2, -1)
    slopes = bias_encoding.slopes_N.double().cuda() / math.sqrt(WIDTH)
    bias = slopes[None, :, None, None] * positions[:, None, None, :].double()
    biased = causal_attention(*bias_encoding(q, k, positions), v)
    plain = causal_attention(q, k, v)
    assert _error(biased, q, k, v, bias) < 1.5 * _error(plain, q, k, v, 0.0)
