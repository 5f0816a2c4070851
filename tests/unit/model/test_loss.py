"""The loss against torch's in float64, in parts of every size, and its memory."""

import pytest
import torch
import torch.nn.functional as F

from megatron_bipe.model import loss
from megatron_bipe.model.loss import token_losses

ROWS, VOCABULARY = 7, 50


def case(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(2, ROWS, VOCABULARY, generator=generator)).to(dtype)
    logits[0, 0] += 1000
    logits[1, 0, 3] = -1000
    labels = torch.randint(0, VOCABULARY, (2, ROWS), generator=generator)
    labels[1, 0] = 3
    return logits, labels, torch.linspace(0.5, 1.5, 2 * ROWS).view(2, ROWS)


@pytest.mark.parametrize("part_rows", [1, 3, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])  # of the largest
def test_token_losses_and_gradients_are_those_of_float64(monkeypatch, part_rows, dtype, tolerance):
    monkeypatch.setitem(loss._PART_ELEMENTS, "cpu", part_rows * VOCABULARY)
    logits, labels, importance = case(dtype)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    (expected * importance).sum().backward()
    leaf = logits.clone().requires_grad_()
    found = token_losses(leaf * 1, labels)
    (found * importance).sum().backward()
    assert found.dtype == torch.float32 and leaf.grad.dtype == dtype
    assert ((found - expected).abs() / expected.abs().clamp_min(1)).max() < 1e-6
    assert (leaf.grad - exact.grad).abs().max() < tolerance * exact.grad.abs().max()


def test_token_losses_gradient_reuses_the_memory_of_the_logits():
    logits, labels, _ = case(torch.bfloat16)
    given = logits.requires_grad_() * 1
    seen = []
    given.register_hook(lambda grad: seen.append(grad.untyped_storage().data_ptr()))
    token_losses(given, labels).mean().backward()
    assert seen == [given.untyped_storage().data_ptr()]


def test_token_losses_without_gradients_leave_the_logits_alone():
    logits, labels, _ = case(torch.float32)
    before = logits.clone()
    with torch.no_grad():
        token_losses(logits, labels)
    assert torch.equal(logits, before)


def test_token_losses_backward_a_second_time_is_an_error():
    logits, labels, _ = case(torch.float32)
    found = token_losses(logits.requires_grad_() * 1, labels).mean()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        found.backward()
