"""A gradient or a loss that is not finite on one rank is skipped by all ranks in any layout, and training continues.

In every layout here: two good updates; one with NaN in the gradient of the logits on one rank; one with an infinite
loss on one rank, whose gradient is unchanged; two more good updates. The bad ones must not change the state, and the
good ones give the same results as without bad ones between, bit for bit.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.layouts import LR, Layout, Placed, batches, run_placed, start
from tests.helpers.tiers import selected, slow

FAST = [
    *(Placed(2, Layout(zero=zero)) for zero in (1, 3)),
    Placed(2, Layout(zero=0, precision="bf16")),
    Placed(2, Layout(pipeline=2, zero=0)),
    Placed(2, Layout(tensor=2, zero=1)),
    Placed(2, Layout(zero=1, precision="bf16")),
    Placed(2, Layout(zero="2_offload", precision="bf16")),
]
SLOW = [
    Placed(4, layout)
    for layout in [
        *(Layout(zero=zero) for zero in (0, 2, "2_offload")),
        *(Layout(zero=zero, precision="bf16") for zero in (1, 2, 3)),
        Layout(zero=0, precision="bf16", tensor=2),
        Layout(zero=0, clip=0.0),
        Layout(tensor=2, zero=0),
        Layout(tensor=2, zero=1, precision="bf16", sequence=True),
        Layout(tensor=2, zero=3),
        Layout(pipeline=2, zero=0, precision="bf16"),
        Layout(pipeline=2, zero=1, precision="bf16"),
        Layout(tensor=2, pipeline=2, zero=0),
        Layout(tensor=2, pipeline=2, zero=1),
    ]
]
PLACED = [*FAST, *slow(SLOW)]


class Seen(NamedTuple):
    """Results of a rank in a layout."""

    norms: list[float]  # of the bad updates
    changed: list[str]  # state that a bad update changed
    losses: list[float]  # of the good updates
    without_bad_steps: list[float]  # the same without bad updates in between
    optimizer_steps: int


def bad_steps(mesh: Mesh, layouts: list[Layout], work_dir: str) -> dict[Layout, Seen]:
    """Train all layouts; the fault is on the last rank, and so on the last stage."""
    return {layout: _bad_steps(mesh, layout, Path(work_dir) / str(number)) for number, layout in enumerate(layouts)}


def _bad_steps(mesh: Mesh, layout: Layout, run_dir: Path) -> Seen:
    from megatron_bipe.engine.deepspeed_internals import optimizer_steps
    from tests.helpers.faults import Arithmetic, expose

    reference, mesh_here = start(layout, mesh, run_dir)
    without_bad_steps = _losses(reference, mesh_here, range(4))
    engine, mesh_here = start(layout, mesh, run_dir)
    expose(engine)
    losses = _losses(engine, mesh_here, range(2))
    before, norms, changed = _state(engine), [], []
    for field, value in (("gradient_factor", torch.nan), ("loss_offset", torch.inf)):
        if mesh.rank == mesh.num_ranks - 1:
            setattr(Arithmetic, field, value)
        norms.append(float(engine.train_step(batches(7, mesh_here), LR).grad_norm))
        Arithmetic.reset()
        changed += [f"{field}: {key}" for key, bits in _state(engine).items() if bits != before[key]]
    return Seen(
        norms,
        changed,
        losses + _losses(engine, mesh_here, range(2, 4)),
        without_bad_steps,
        optimizer_steps(engine._optimizer),
    )


def _losses(engine: Any, mesh: Mesh, steps: range) -> list[float]:
    return [float(engine.train_step(batches(step, mesh), LR).loss_nats) for step in steps]


def _state(engine: Any) -> dict[tuple[str, str], bytes]:
    from megatron_bipe.engine.deepspeed_internals import fragments

    held = fragments(engine._engine.module, engine._optimizer)
    return {(f.name, kind): tensor.numpy().tobytes() for f in held for kind, tensor in f.state.items()}


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Placed, list[Seen]]:
    return run_placed(bad_steps, selected(request, "placed"), tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize("placed", PLACED, ids=str)
def test_bad_step_on_one_rank_updates_nothing_on_any(seen: dict[Placed, list[Seen]], placed: Placed) -> None:
    for rank in seen[placed]:
        assert not any(map(torch.isfinite, torch.tensor(rank.norms)))
        assert rank.changed == []
        assert rank.optimizer_steps == 4


@pytest.mark.parametrize("placed", PLACED, ids=str)
def test_bad_step_does_not_affect_later_steps(seen: dict[Placed, list[Seen]], placed: Placed) -> None:
    for rank in seen[placed]:
        assert rank.losses == rank.without_bad_steps
        assert len(set(rank.losses)) == 4
