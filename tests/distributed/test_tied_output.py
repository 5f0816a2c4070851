"""A tied output in any layout: the losses of one process, and one embedding in the checkpoint.

Measured in fp32 over 8 steps (largest over the layouts here): losses differ by 1.4e-7 relative, gradient norms by
2.8e-7; in bf16 losses differ by 4.8e-4.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_bipe.checkpoint.find import find_checkpoint
from megatron_bipe.checkpoint.shard_files import WEIGHT, StateReader
from megatron_bipe.config import RunConfig
from megatron_bipe.model.transformer import TOKEN_EMBEDDING
from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.layouts import STEPS, Layout, Placed, run_config, run_placed, start_engine_of, train_steps
from tests.helpers.tiers import selected, slow

LOSS_TOLERANCE = {"fp32": 2e-6, "bf16": 1e-3}  # relative
NORM_TOLERANCE = 2e-5
WEIGHT_TOLERANCE = 5e-5  # absolute: Adam divides small gradients by their own size
FAST = [
    Placed(2, Layout(pipeline=2, zero=0)),
    Placed(2, Layout(tensor=2, zero=1, sequence=True)),
    Placed(2, Layout(zero=2, precision="bf16")),
]
SLOW = [
    Placed(4, Layout(pipeline=4, zero=0)),
    Placed(4, Layout(tensor=2, pipeline=2, zero=1, sequence=True)),
    Placed(4, Layout(pipeline=2, zero=1)),
    Placed(4, Layout(tensor=2, zero=3)),
    Placed(4, Layout(tensor=4, zero=0)),
    Placed(4, Layout(pipeline=2, tensor=2, zero=1, precision="bf16")),
    Placed(4, Layout(pipeline=2, zero=0, precision="bf16")),
]
PLACED, ALONE = [*FAST, *slow(SLOW)], Placed(1, Layout(zero=0))


class Trained(NamedTuple):
    """Results of a rank."""

    losses: list[float]
    norms: list[float]
    resumed_losses: list[float]  # of the second half, repeated from the checkpoint
    run_dir: Path


def tied(layout: Layout, run_dir: Path) -> RunConfig:
    run = run_config(layout, run_dir)
    return run.model_copy(update={"model": run.model.model_copy(update={"tied_output": True})})


def train_tied(mesh: Mesh, layouts: list[Layout], work_dir: str) -> dict[Layout, Trained]:
    """Train each layout, and train it again from its checkpoint at half of the steps."""
    found = {}
    for number, layout in enumerate(layouts):
        run_dir = Path(work_dir) / str(number)
        run = tied(layout, run_dir)
        engine, mesh_here = start_engine_of(run, mesh, layout.zero)
        losses, norms = train_steps(engine, mesh_here, range(STEPS // 2))
        engine.save(run_dir, STEPS // 2)
        more_losses, more_norms = train_steps(engine, mesh_here, range(STEPS // 2, STEPS))
        again, _ = start_engine_of(run, mesh, layout.zero)
        again.load(find_checkpoint(run_dir).folder)
        resumed, _ = train_steps(again, mesh_here, range(STEPS // 2, STEPS))
        found[layout] = Trained(losses + more_losses, norms + more_norms, resumed, run_dir)
    return found


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Placed, list[Trained]]:
    return run_placed(train_tied, [ALONE, *selected(request, "placed")], tmp_path_factory.mktemp("tied"))


@pytest.mark.parametrize("placed", PLACED, ids=str)
def test_tied_output_gives_the_losses_and_norms_of_one_process(
    found: dict[Placed, list[Trained]], placed: Placed
) -> None:
    [expected] = found[ALONE]
    precision = placed.layout.precision
    for trained in found[placed]:
        assert trained.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE[precision])
        if precision == "fp32":
            assert trained.norms == pytest.approx(expected.norms, rel=NORM_TOLERANCE)


@pytest.mark.parametrize("placed", PLACED, ids=str)
def test_tied_output_resumed_is_bit_identical(found: dict[Placed, list[Trained]], placed: Placed) -> None:
    for trained in found[placed]:
        assert trained.resumed_losses == trained.losses[STEPS // 2 :]


@pytest.mark.parametrize("placed", PLACED, ids=str)
def test_tied_output_checkpoint_has_the_embedding_once(found: dict[Placed, list[Trained]], placed: Placed) -> None:
    written, expected = (StateReader(find_checkpoint(found[each][0].run_dir).folder) for each in (placed, ALONE))
    assert written.index.parameters.keys() == expected.index.parameters.keys()
    assert not any("output" in name for name in written.index.parameters)
    if placed.layout.precision == "fp32":
        tables = [reader.full(WEIGHT, TOKEN_EMBEDDING) for reader in (written, expected)]
        torch.testing.assert_close(*tables, rtol=0, atol=WEIGHT_TOLERANCE)
