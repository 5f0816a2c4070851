"""Norm and gate with explicit backward passes, against autograd."""

import pytest
import torch
import torch.nn.functional as F

from megatron_bipe.config import ModelConfig
from megatron_bipe.model.transformer import LocalLayers, RMSNorm, SwiGLU

DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5


def norm_case(dtype):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(48, EPS).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(1 + torch.randn(48, generator=generator) / 4)
    hidden = (3 * torch.randn(2, 5, 48, generator=generator)).to(dtype)
    hidden[0, 0] = 0  # the epsilon alone
    return norm, hidden.requires_grad_(), torch.randn(2, 5, 48, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_torchs_bit_for_bit_with_and_without_gradients(dtype):
    norm, hidden, _ = norm_case(dtype)
    expected = F.rms_norm(hidden, (48,), norm.weight, EPS)
    assert torch.equal(norm(hidden), expected)
    with torch.no_grad():
        assert torch.equal(norm(hidden), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])  # of the largest
def test_rms_norm_gradients_are_those_of_float64(dtype, tolerance):
    norm, hidden, grad = norm_case(dtype)
    norm(hidden).backward(grad)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, norm.weight))
    F.rms_norm(exact_hidden, (48,), exact_weight, EPS).backward(grad.double())
    for found, exact in ((hidden.grad, exact_hidden.grad), (norm.weight.grad, exact_weight.grad)):
        assert found.dtype == dtype
        for row, exact_row in zip(found.flatten(0, -2) if found.ndim > 1 else [found], exact.view(-1, 48), strict=True):
            assert (row - exact_row).abs().max() <= tolerance * exact_row.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_is_autograds_bit_for_bit(dtype):
    config = ModelConfig(hidden_size=16, num_heads=2, ffn_size=24)
    layer = SwiGLU(config, LocalLayers()).to(dtype)
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    gate, up = layer.gate_up(hidden).chunk(2, dim=-1)
    expected = layer.down(F.silu(gate) * up)
    sources = (hidden, layer.gate_up.weight, layer.down.weight)
    gradients = [torch.autograd.grad((y * y).sum(), sources) for y in (expected, layer(hidden))]
    assert torch.equal(layer(hidden), expected)
    assert all(map(torch.equal, *gradients))
