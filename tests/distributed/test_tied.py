"""A tied output in any layout: one process's losses, one table in the checkpoint.

Measured in fp32 over 8 steps (largest over the layouts here): losses differ by 1.4e-7 relative, gradient norms by
2.8e-7; in bf16 losses differ by 4.8e-4.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bipe.config.schema import RunConfig
from megatron_bipe.engine.checkpoint import find_checkpoint
from megatron_bipe.engine.state_files import WEIGHT, StateReader
from megatron_bipe.model.tied import TOKEN_TABLE
from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.layouts import STEPS, Layout, run_config, start_engine_of, train_steps
from tests.helpers.ranks import run_ranks
from tests.helpers.tiers import selected, slow

LOSS_TOLERANCE = {"fp32": 2e-6, "bf16": 1e-3}  # relative
NORM_TOLERANCE = 2e-5
WEIGHT_TOLERANCE = 5e-5  # absolute: Adam divides small gradients by their own size
FAST = [
    Layout(pipeline=4, zero=0),
    Layout(tensor=2, pipeline=2, zero=1, sequence=True),
    Layout(zero=2, precision="bf16"),
]
SLOW = [
    Layout(pipeline=2, zero=1),
    Layout(tensor=2, zero=3),
    Layout(tensor=4, zero=0),
    Layout(pipeline=2, tensor=2, zero=1, precision="bf16"),
    Layout(pipeline=2, zero=0, precision="bf16"),
]
LAYOUTS = [*FAST, *slow(SLOW)]


def tied(layout: Layout, run_dir: Path) -> RunConfig:
    run = run_config(layout, run_dir)
    return run.model_copy(update={"model": run.model.model_copy(update={"tied_output": True})})


def train_tied(mesh: Mesh, layouts: list[Layout], work_dir: str) -> dict[Layout, Any]:
    """Train each, and once more from half-way, by one process's checkpoint."""
    found = {}
    for layout in layouts:
        run_dir = Path(work_dir) / f"{layout}-{mesh.num_ranks}"
        run = tied(layout, run_dir)
        engine, laid_out = start_engine_of(run, mesh, layout.zero)
        losses, norms = train_steps(engine, laid_out, range(STEPS // 2))
        engine.save(run_dir, STEPS // 2)
        more_losses, more_norms = train_steps(engine, laid_out, range(STEPS // 2, STEPS))
        again, _ = start_engine_of(run, mesh, layout.zero)
        again.load(find_checkpoint(run_dir).folder)
        resumed, _ = train_steps(again, laid_out, range(STEPS // 2, STEPS))
        found[layout] = (losses + more_losses, norms + more_norms, resumed)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tied")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    return run_ranks(train_tied, 1, folder / "1", layouts=[Layout(zero=0)], work_dir=str(folder))[0][Layout(zero=0)]


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, folder: Path) -> Any:
    layouts = sorted(selected(request, "layout"), key=lambda layout: layout.tensor * layout.pipeline)
    return run_ranks(train_tied, 4, folder / "4", layouts=layouts, work_dir=str(folder))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tied_output_gives_the_losses_and_norms_of_one_process(alone: Any, ranks: Any, layout: Layout) -> None:
    expected_losses, expected_norms, _ = alone
    for rank in ranks:
        losses, norms, _ = rank[layout]
        assert losses == pytest.approx(expected_losses, rel=LOSS_TOLERANCE[layout.precision])
        if layout.precision == "fp32":
            assert norms == pytest.approx(expected_norms, rel=NORM_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tied_output_resumed_is_the_same_bits(ranks: Any, layout: Layout) -> None:
    for rank in ranks:
        losses, _, resumed = rank[layout]
        assert resumed == losses[STEPS // 2 :]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tied_output_checkpoint_has_the_table_once(folder: Path, alone: Any, ranks: Any, layout: Layout) -> None:
    expected, found = (
        StateReader(find_checkpoint(folder / name).folder) for name in (f"{Layout(zero=0)}-1", f"{layout}-4")
    )
    assert found.index.parameters.keys() == expected.index.parameters.keys()
    assert not any("output" in name for name in found.index.parameters)
    if layout.precision == "fp32":
        tables = [reader.whole(WEIGHT, TOKEN_TABLE) for reader in (found, expected)]
        torch.testing.assert_close(*tables, rtol=0, atol=WEIGHT_TOLERANCE)
