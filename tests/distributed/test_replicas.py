"""Replicated parameters stay bit-identical, and a flipped bit is detected."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bipe.errors import DivergenceError
from megatron_bipe.model.layer_factory import shard_of
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.parallel.replica_check import bits_hash
from tests.helpers.layouts import Layout, Placed, run_placed, start, train_steps
from tests.helpers.ranks import run_ranks
from tests.helpers.tiers import selected, slow

MANY_STEPS = 50
FAST = [Placed(2, Layout(tensor=2, zero=2, sequence=True, precision="bf16", micro=8))]
SLOW = [
    Placed(4, Layout(tensor=2, zero=1, micro=8)),
    Placed(4, Layout(tensor=2, zero=2, sequence=True, precision="bf16", micro=8)),
    Placed(4, Layout(tensor=2, pipeline=2, zero=1, sequence=True, precision="bf16", micro=8)),
    Placed(4, Layout("bipe_alibi", tensor=4, zero=1, sequence=True, micro=8)),
    Placed(4, Layout(tensor=4, zero=1, precision="bf16", micro=8)),
    Placed(4, Layout(tensor=2, zero=3, sequence=True, micro=8)),
]
NORM, SPLIT = "1.attention_norm.weight", "1.mlp.down.weight"


def keep_in_step(mesh: Mesh, layouts: list[Layout], work_dir: str) -> dict[Layout, dict[str, bytes]]:
    """Return the bits of what is not sharded, after many steps and a check that no rank differs."""
    found = {}
    for layout in layouts:
        engine, mesh_here = start(layout, mesh, Path(work_dir) / str(layout))
        train_steps(engine, mesh_here, range(MANY_STEPS), layout.micro)
        engine.check_replicas(MANY_STEPS)
        replicated = {name: p for name, p in engine._engine.module.named_parameters() if shard_of(p) is None}
        found[layout] = {name: bits(getattr(p, "ds_tensor", p)) for name, p in replicated.items()}
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_placed(keep_in_step, selected(request, "placed"), tmp_path_factory.mktemp("kept"))


@pytest.mark.parametrize("placed", [*FAST, *slow(SLOW)], ids=str)
def test_replicated_parameters_are_bit_identical_on_tensor_ranks_after_many_steps(kept: Any, placed: Placed) -> None:
    of_ranks = kept[placed]
    assert any(of_ranks)
    for rank, found in enumerate(of_ranks):
        assert found == of_ranks[rank - rank % placed.layout.tensor]


def flip_bits(mesh: Mesh, work_dir: str) -> dict[str, str]:
    """Return the error of the check after one bit flipped on one rank."""
    cases = {
        "data": (Layout(zero=1), 2, SPLIT, "weight"),
        "tensor": (Layout(tensor=2, zero=1, precision="bf16"), 1, NORM, "weight"),
        "tensor of four": (Layout(tensor=4, zero=2), 3, NORM, "weight"),
        "split": (Layout(tensor=2, zero=1, precision="bf16"), 3, SPLIT, "weight"),
        "state": (Layout(tensor=2, zero=3), 0, NORM, "exp_avg_sq"),
    }
    communicated = {}
    for case, (layout, culprit, name, kind) in cases.items():
        engine, mesh_here = start(layout, mesh, Path(work_dir) / case)
        train_steps(engine, mesh_here, range(1))
        engine.check_replicas(1)
        if mesh.rank == culprit:
            flip(engine, name, kind)
        try:
            engine.check_replicas(2)
            communicated[case] = "all is well"
        except DivergenceError as error:
            communicated[case] = str(error)
    return communicated


def flip(engine: Any, name: str, kind: str) -> None:
    from megatron_bipe.engine.deepspeed_internals import fragments

    tensor = dict(engine._engine.module.named_parameters())[name].detach()
    if kind != "weight":
        tensor = next(f for f in fragments(engine._engine.module, engine._optimizer) if f.name == name).state[kind]
    tensor.view(torch.uint8).flatten()[4] ^= 1  # the lowest bit of the second or third element


@pytest.fixture(scope="module")
def communicated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("flipped")
    return run_ranks(flip_bits, 4, folder, work_dir=str(folder))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("data", f"copies of the weights on ranks [0, 1, 2, 3]: rank 2 in {SPLIT}."),
        ("tensor", f"copies of the weights on ranks [1, 3]: rank 1 and 3 in {NORM}."),
        ("tensor of four", f"tensor-parallel ranks [0, 1, 2, 3]: rank 3 in {NORM} (compute weight)"),
        ("split", f"copies of the weights on ranks [1, 3]: rank 1 and 3 in {SPLIT}."),
        ("state", f"tensor-parallel ranks [0, 1]: rank 0 and 1 in {NORM} (exp_avg_sq)."),
    ],
)
def test_check_replicas_names_the_ranks_and_the_parameter_of_a_flipped_bit(
    communicated: Any, case: str, expected: str
) -> None:
    for message in (rank[case] for rank in communicated):
        assert "after step 2 ranks differ" in message
        assert expected in message
        assert "Continue from the last checkpoint" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_bits_hash_differs_for_any_bit_anywhere(dtype: torch.dtype) -> None:
    tensor = torch.arange(300).to(dtype)
    usual = int(bits_hash([tensor])[0])
    for position in range(tensor.numel() * tensor.element_size()):
        changed = tensor.clone()
        changed.view(torch.uint8)[position] ^= 1 << position % 8
        assert int(bits_hash([changed])[0]) != usual


def test_bits_hash_distinguishes_signed_zeros_order_and_nan() -> None:
    tensors = [[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0], [float("nan"), 1.0]]
    hashes = bits_hash([torch.tensor(values) for values in tensors])
    assert len(set(hashes.tolist())) == len(tensors)
    assert torch.equal(hashes, bits_hash([torch.tensor(values) for values in tensors]))
