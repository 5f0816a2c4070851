"""The loss against torch's in float64, eager in parts of every size and compiled, and its memory."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from megatron_bipe.model import loss
from megatron_bipe.model.loss import RowSums, loss_passes, token_losses

ROWS, VOCABULARY = 7, 50
INFINITE, NOT_A_NUMBER = float("inf"), float("nan")
INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


def case(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(2, ROWS, VOCABULARY, generator=generator)).to(dtype)
    logits[0, 0] += 1000
    logits[1, 0, 3] = -1000
    labels = torch.randint(0, VOCABULARY, (2, ROWS), generator=generator)
    labels[1, 0] = 3
    return logits, labels, torch.linspace(0.5, 1.5, 2 * ROWS).view(2, ROWS)


def compare_with_float64(logits, labels, importance, tolerance, **options):
    """Compare losses and gradients; values that are not finite must be the same ones."""
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    (expected * importance).sum().backward()
    leaf = logits.clone().requires_grad_()
    found = token_losses(leaf * 1, labels, **options)
    (found * importance).sum().backward()
    assert found.dtype == torch.float32 and leaf.grad.dtype == logits.dtype
    largest = exact.grad[exact.grad.isfinite()].abs().max()
    assert_close(found.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert_close(leaf.grad.double(), exact.grad, rtol=0, atol=float(tolerance * largest))


assert_close = partial(torch.testing.assert_close, equal_nan=True)
tolerances = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])


@pytest.mark.parametrize("part_rows", [1, 3, 100])
@tolerances  # of the largest gradient
def test_token_losses_and_gradients_are_those_of_float64(monkeypatch, part_rows, dtype, tolerance):
    monkeypatch.setitem(loss._PART_ELEMENTS, "cpu", part_rows * VOCABULARY)
    compare_with_float64(*case(dtype), tolerance)


@pytest.fixture(params=["aot_eager"])
def compiled(request, monkeypatch):
    """Compile with the backend of this case; return the number of compiled graphs so far."""
    torch._dynamo.reset()
    loss_passes.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    loss_passes.cache_clear()


with_inductor = pytest.mark.parametrize("compiled", ["aot_eager", INDUCTOR], indirect=True)


@with_inductor
@tolerances
def test_compiled_losses_and_gradients_are_those_of_float64(compiled, dtype, tolerance):
    logits, labels, importance = case(dtype)
    compare_with_float64(logits, labels, importance, tolerance, compiles=True)
    with torch.no_grad():  # validation runs the code of training
        token_losses(logits, labels, compiles=True)
    assert compiled() == 2


def test_training_runs_the_same_code_before_and_after_a_validation_of_another_shape(compiled, monkeypatch):
    ran = []

    def backend(graph, _):
        def run(*inputs):
            ran.append(graph)
            return graph(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    logits, labels, _ = case(torch.float32)

    def train():
        ran.clear()
        token_losses(logits.clone().requires_grad_() * 1, labels, compiles=True).mean().backward()
        return [*ran]

    before = train()
    with torch.no_grad():
        for rows in (1, 2):
            token_losses(logits[:, :rows], labels[:, :rows], compiles=True)
    assert train() == before and len(before) == 2


def test_each_of_more_shapes_than_torch_compiles_by_default_is_compiled(compiled):
    with torch.no_grad():
        for rows in range(1, 13):
            logits, labels = torch.randn(1, rows, VOCABULARY), torch.arange(rows)[None]
            found = token_losses(logits, labels, compiles=True)
            assert_close(found, token_losses(logits, labels), rtol=1e-5, atol=1e-6)
    assert compiled() == 12


@with_inductor
@pytest.mark.parametrize("compiles", [False, True])
def test_logits_that_are_not_finite_give_the_values_of_float64(compiled, compiles):
    logits, labels = torch.zeros(1, 6, 5), torch.tensor([[0, 1, 2, 3, 4, 0]])
    logits[0, 0, 1] = -INFINITE  # a column that is excluded
    logits[0, 1, 1] = -INFINITE  # the label
    logits[0, 2, 1] = INFINITE
    logits[0, 3, 0] = NOT_A_NUMBER
    logits[0, 4] = -INFINITE
    compare_with_float64(logits, labels, torch.ones(1, 6), 1e-6, compiles=compiles)


def test_compiled_passes_are_the_eager_ones_for_labels_of_other_ranks(compiled):
    logits_Kv = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    logits_Kv[0, 0] = -INFINITE
    columns_K, highest_K, grad_K = torch.tensor([-1, 5, 2, -7]), logits_Kv.amax(dim=1) + 1, torch.ones(4)
    eager, fused = (loss_passes(compiles).sum_rows(logits_Kv, columns_K, highest_K) for compiles in (False, True))
    assert eager.labels_K.tolist() == [0, 0, float(logits_Kv[2, 2] - highest_K[2]), 0]
    torch.testing.assert_close(tuple(fused), tuple(eager), rtol=1e-6, atol=1e-6)
    gradients = [
        loss_passes(compiles).gradients_in_place(logits_Kv.clone(), columns_K, RowSums(*eager), grad_K)
        for compiles in (False, True)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)
    assert (gradients[0][[0, 1, 3]] >= 0).all() and gradients[0][2, 2] < 0


@with_inductor
@pytest.mark.parametrize("compiles", [False, True])
def test_token_losses_gradient_reuses_the_memory_of_the_logits(compiled, compiles):
    logits, labels, _ = case(torch.bfloat16)
    given = logits.requires_grad_() * 1
    seen = []
    given.register_hook(lambda grad: seen.append(grad.untyped_storage().data_ptr()))
    token_losses(given, labels, compiles=compiles).mean().backward()
    assert seen == [given.untyped_storage().data_ptr()]


@pytest.mark.parametrize("compiles", [False, True])
def test_token_losses_without_gradients_leave_the_logits_alone(compiled, compiles):
    logits, labels, _ = case(torch.float32)
    before = logits.clone()
    with torch.no_grad():
        token_losses(logits, labels, compiles=compiles)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("compiles", [False, True])
def test_token_losses_backward_a_second_time_is_an_error(compiled, compiles):
    logits, labels, _ = case(torch.float32)
    found = token_losses(logits.requires_grad_() * 1, labels, compiles=compiles).mean()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        found.backward()
