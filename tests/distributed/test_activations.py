"""Activations that blocks keep for the backward pass, measured over live tensors, against the dry run's estimate."""

import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_bipe.config import ModelConfig, ParallelConfig
from megatron_bipe.estimate.memory import block_bytes_per_token, table_bytes_per_token
from megatron_bipe.model.transformer import LocalLayers, make_plan
from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.ranks import run_ranks
from tests.helpers.tiers import selected, slow

TOKENS = 64
SETTLE_S = 0.05  # a gloo thread keeps the tensors of a finished collective until its next one
MODELS = {
    "bipe_rope": {"encoding": "bipe_rope"},
    "bipe_alibi": {"encoding": "bipe_alibi"},
    "grouped rope": {"encoding": "rope", "num_kv_heads": 2},
    "grouped alibi": {"encoding": "alibi", "num_kv_heads": 2},
    "one group": {"encoding": "rope", "num_kv_heads": 1},
    "xpos": {"encoding": "xpos"},
    "nope": {"encoding": "bipe_nope"},
}
RECOMPUTE = ("none", "selective", "full")
DTYPES = (torch.bfloat16, torch.float32)
LAYOUTS = {
    "tensor": ParallelConfig(tensor=2),
    "sequence": ParallelConfig(tensor=2, sequence=True),
    "context": ParallelConfig(context=2),
}


def config(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig(hidden_size=128, num_heads=4, ffn_size=192, **(MODELS[name] | changes))


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """Exclude all existing objects from garbage collection and from `alive`."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive() -> dict[int, int]:
    """Return the bytes of each storage of a live tensor, by address."""
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def kept_bytes(model: ModelConfig, recompute: Any, dtype: torch.dtype, layers: Any, tokens_here: int) -> int:
    """Return the bytes that autograd and recomputation keep after a block's forward pass, without its output."""
    block = make_plan(model, 0, layers, recompute)[1].build().to(dtype)
    hidden = torch.randn(1, tokens_here, 128, dtype=dtype, requires_grad=True)
    positions = torch.arange(max(TOKENS, tokens_here))[None] // 7
    block.attention.prepare(positions, dtype)  # keeps the frequencies, which do not grow with the tokens
    before = alive()
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = block((hidden, positions))
    if torch.distributed.is_initialized():
        time.sleep(SETTLE_S)
    result = output.untyped_storage().data_ptr()
    fresh = {pointer: size for pointer, size in alive().items() if pointer not in before | {result: 0}}
    return sum((saved | fresh).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", MODELS)
def test_block_keeps_what_the_estimate_says(name: str, recompute: Any, dtype: torch.dtype) -> None:
    measured = kept_bytes(config(name), recompute, dtype, LocalLayers(), TOKENS)
    assert estimate(config(name), ParallelConfig(), dtype, recompute, TOKENS) == measured


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("encoding", ["t5", "bipe_t5"])
def test_block_that_materialises_scores_keeps_about_what_the_estimate_says(
    encoding: str, recompute: Any, dtype: torch.dtype
) -> None:
    """Measured: up to 3.1%, due to copies inside torch's math attention."""
    t5 = config("nope", encoding=encoding)
    measured = kept_bytes(t5, recompute, dtype, LocalLayers(), 1024)
    assert estimate(t5, ParallelConfig(), dtype, recompute, 1024) == pytest.approx(measured, rel=0.04)


def estimate(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, recompute: str, tokens: int) -> float:
    """Return the bytes for one sequence of a block, and of the tensors that all blocks of a stage share."""
    block = block_bytes_per_token(model, parallel, dtype.itemsize, recompute, tokens)
    return (block + table_bytes_per_token(model, parallel, dtype.itemsize, tokens)) * tokens / parallel.context


def measure_split(mesh: Mesh, dtypes: list[torch.dtype]) -> dict[tuple[Any, ...], int]:
    """Measure every model and mode in every layout."""
    import torch.distributed as dist

    from megatron_bipe.engine.base import make_layers

    dist.init_process_group("gloo")
    return {
        (name, recompute, dtype, layout): kept_bytes(
            config(name), recompute, dtype, make_layers(mesh.with_layout(parallel))[0], TOKENS // hidden_parts(parallel)
        )
        for layout, parallel in LAYOUTS.items()
        for name in MODELS
        for recompute in RECOMPUTE
        for dtype in dtypes
    }


def hidden_parts(parallel: ParallelConfig) -> int:
    return parallel.context * (parallel.tensor if parallel.sequence else 1)


@pytest.fixture(scope="module")
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], int]:
    return run_ranks(measure_split, 2, tmp_path_factory.mktemp("split"), dtypes=selected(request, "split_dtype"))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split_dtype", [torch.bfloat16, *slow([torch.float32])], ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", MODELS)
def test_split_block_keeps_what_the_estimate_says(
    split: Any, name: str, recompute: Any, split_dtype: torch.dtype, layout: str
) -> None:
    parallel = LAYOUTS[layout]
    measured = split[name, recompute, split_dtype, layout]
    assert estimate(config(name), parallel, split_dtype, recompute, TOKENS) == measured
