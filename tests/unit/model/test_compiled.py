"""Blocks compiled by AOT autograd without code generation: one graph, and the results of eager blocks."""

from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from megatron_bipe.config import ModelConfig
from megatron_bipe.config.encodings import RELATIVE
from megatron_bipe.errors import ConfigError
from megatron_bipe.model import fused
from megatron_bipe.model.transformer import LocalLayers, build_model

RECOMPUTE = ("none", "selective", "full")
GRADIENT_ERROR = 1e-5  # relative; measured: up to 2e-6, since the norm's backward pass is torch's own


@pytest.fixture
def counter(monkeypatch):
    """Count compilations; code is not generated."""
    torch._dynamo.reset()
    counting, compile_any = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_any(f, backend=counting, **options))
    yield counting
    torch._dynamo.reset()


def model_of(encoding, compiles, recompute="none", num_layers=3):
    shape = {"num_layers": num_layers, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 24}
    config = ModelConfig(**shape, vocab_size=20, encoding=encoding, train_len_tokens=64, init_std=0.5, log_scale=True)
    return build_model(config, 0, LocalLayers(compiles=compiles), recompute)


def ids(rows, tokens=24):
    position_ids = torch.arange(tokens).expand(rows, tokens)
    return position_ids % 20, position_ids % 5, position_ids // 5


def check_equals_eager(encoding, recompute):
    results = []
    for compiles in (False, True):
        model = model_of(encoding, compiles, recompute)
        logits = model(ids(2))
        logits.square().mean().backward()
        results.append((logits, [p.grad for p in model.parameters()]))
    (wanted, wanted_gradients), (found, gradients) = results
    assert torch.equal(found, wanted)
    for gradient, exact in zip(gradients, wanted_gradients, strict=True):
        assert (gradient - exact).norm() <= GRADIENT_ERROR * exact.norm()


@pytest.mark.parametrize("encoding", [*(f"bipe_{relative}" for relative in RELATIVE), "t5"])
def test_every_relative_part_is_one_graph_for_all_blocks(encoding, counter):
    check_equals_eager(encoding, "none")
    assert counter.frame_count == 1


@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
@pytest.mark.parametrize("encoding", ["bipe_rope", "bipe_alibi"])
def test_recomputation_is_part_of_the_graph(encoding, recompute, counter):
    check_equals_eager(encoding, recompute)
    assert counter.frame_count == 1


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_many_blocks_and_a_validation_of_other_shape_compile_once_each(recompute, counter):
    model = model_of("bipe_alibi", True, recompute, num_layers=12)
    for _ in range(2):
        model(ids(2)).sum().backward()
        with torch.no_grad():
            model.eval()(ids(1))
        model.train()
    assert counter.frame_count == 2


def test_recomputed_graph_keeps_only_its_inputs(counter):
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    model = model_of("bipe_rope", True, "full", num_layers=1)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    payload = model[0](ids(2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model[1](payload)
    kept = [x for x in saved if x.untyped_storage().data_ptr() not in weights and x.is_floating_point()]
    assert sum(x.shape == (2, 24, 32) for x in kept) == 1  # hidden
    assert all(x.shape in ((2, 24, 32), (2, 1, 24, 4), (2, 1, 24, 1)) for x in kept)  # and what positions determine


@pytest.mark.parametrize("failing", ["fw_compiler", "bw_compiler"])
def test_a_failed_compilation_names_the_setting(monkeypatch, failing):
    def fail(*_):
        raise RuntimeError("no compiler")

    working = dict.fromkeys(("fw_compiler", "bw_compiler"), lambda graph, _: graph.forward)
    backend = aot_autograd(**working | {failing: fail})
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    run = fused.compile_fused(lambda x: x.sin())
    with pytest.raises(ConfigError, match=r"no compiler(.|\n)*train\.compile=off"):
        run(torch.ones(2, requires_grad=True))  # at the call, so backward of a block needs no handler
    torch._dynamo.reset()
