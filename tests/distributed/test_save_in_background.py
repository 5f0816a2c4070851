"""A checkpoint written in the background holds the state at the time of the save, wherever DeepSpeed keeps it.

The copy begins when an update is about to change the state, and is slow: the update would be in it if it did not wait.
"""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bipe.checkpoint.find import find_checkpoint, list_steps
from megatron_bipe.checkpoint.shard_files import KINDS, StateReader
from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.layouts import Layout, Placed, run_placed, start, train_steps
from tests.helpers.tiers import selected, slow

COPY_S, NEVER_S = 0.3, 5.0
FAST = [
    Layout(zero=0),
    Layout(zero=1, precision="bf16"),
    Layout(zero=3, precision="bf16"),
    Layout(pipeline=2, zero=1, precision="bf16"),
]
SLOW = [Layout(zero=0, precision="bf16"), Layout(zero=2), Layout(tensor=2, zero=1)]
LAYOUTS = [*FAST, *slow(SLOW)]


def begin_at_the_update(saver: Any) -> None:
    take, wait, at_update = saver._copy.take, saver.before_update, threading.Event()

    def late(*arguments: Any) -> Any:
        at_update.wait(NEVER_S)
        time.sleep(COPY_S)
        return take(*arguments)

    def noted() -> None:
        at_update.set()
        wait()

    saver._copy.take, saver.before_update = late, noted


def save_both_ways(mesh: Mesh, layouts: list[Layout], work_dir: str) -> dict[Layout, dict[str, Any]]:
    results = {}
    for number, layout in enumerate(layouts):
        blocking, background = Path(work_dir) / f"{number}-blocking", Path(work_dir) / f"{number}-background"
        engine, mesh_here = start(layout, mesh, blocking)
        train_steps(engine, mesh_here, range(2))
        torch.manual_seed(mesh.rank)
        engine.save(blocking, 2)
        begin_at_the_update(engine._saver)
        engine.save(background, 2, final=False)
        drawn = torch.rand(3)
        losses = train_steps(engine, mesh_here, range(2, 4))[0]
        engine.save(background, 4)  # waits for the other
        engine.load(engine.latest_valid_checkpoint(blocking).folder)
        results[layout] = {
            "drawn again": torch.equal(torch.rand(3), drawn),
            "losses again": train_steps(engine, mesh_here, range(2, 4))[0] == losses,
            "folders": (blocking, background),
        }
    return results


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    placed = [Placed(2, layout) for layout in selected(request, "layout")]
    return run_placed(save_both_ways, placed, tmp_path_factory.mktemp("in-background"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_save_in_background_holds_the_bits_at_the_time_of_the_save(ranks, layout):
    blocking, background = ranks[Placed(2, layout)][0]["folders"]
    assert list_steps(background) == [2, 4]
    expected, found, later = (
        StateReader(find_checkpoint(spec).folder) for spec in (blocking, f"{background}@2", f"{background}@4")
    )
    assert found.index.optimizer_steps == expected.index.optimizer_steps == 2
    assert found.index.parameters == expected.index.parameters
    for name in expected.index.parameters:
        for kind in KINDS:
            assert torch.equal(found.full(kind, name), expected.full(kind, name)), (name, kind)
    assert any(
        not torch.equal(found.full("weight", name), later.full("weight", name)) for name in found.index.parameters
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_load_continues_losses_and_random_generators(ranks, layout):
    for rank in ranks[Placed(2, layout)]:
        assert rank["losses again"] and rank["drawn again"]
