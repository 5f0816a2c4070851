"""How often an update waits for a GPU, per micro-batch and besides, in each ZeRO stage; `device_waits` counts.

A wait that is new, in this project's code or in a new version of DeepSpeed, changes a number here.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.layouts import LR, Layout, batches, run_config, start_engine_of
from tests.helpers.ranks import run_ranks
from tests.helpers.tiers import selected, slow

WARM_UP = 3  # updates; DeepSpeed's throughput timer begins to wait in the third one


class Waits(NamedTuple):
    """Waits of one rank, by what they are for."""

    synchronize: int = 0
    read: int = 0
    from_host: int = 0  # copies of Python numbers to the device


class Update(NamedTuple):
    """Waits of an update."""

    micro_batch: Waits
    besides: Waits


class Case(NamedTuple):
    """A layout with a number of ranks."""

    ranks: int
    zero: int | str
    precision: str = "bf16"
    encoding: str = "bipe_rope"
    pipeline: int = 1


NONE = Waits()
FAST = {
    Case(1, 0): Update(NONE, NONE),
    Case(1, 1): Update(NONE, NONE),
    Case(1, 2): Update(NONE, Waits(read=4, from_host=2)),
    Case(2, 1): Update(NONE, NONE),
    Case(2, 1, pipeline=2): Update(NONE, NONE),
}
SLOW = {
    Case(1, 0, "fp32"): Update(NONE, NONE),
    Case(1, 1, encoding="bipe_alibi"): Update(NONE, NONE),
    Case(1, 3): Update(Waits(synchronize=1), Waits(synchronize=1, read=1, from_host=2)),
    # With offload: an event for each gradient's copy to the host, 28 here; reads of tensors that are there anyway.
    Case(1, "2_offload"): Update(NONE, Waits(synchronize=28, read=8, from_host=5)),
    Case(1, "3_offload"): Update(Waits(synchronize=1), Waits(synchronize=1, read=5, from_host=4)),
    Case(2, 2): Update(Waits(synchronize=1), Waits(read=4, from_host=2)),
    Case(2, 0, "fp32", pipeline=2): Update(NONE, NONE),
    Case(2, 0, pipeline=2): Update(NONE, Waits(read=2, from_host=1)),
}


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Update]:
    chosen, counted = selected(request, "case"), {}
    for ranks in sorted({case.ranks for case in chosen}):
        folder = tmp_path_factory.mktemp("waits")
        # Stages last: DeepSpeed keeps the groups of an earlier engine, and would then miss some.
        cases = sorted((case for case in chosen if case.ranks == ranks), key=lambda case: case.pipeline)
        counted |= run_ranks(count_waits, ranks, folder, cases=cases, work_dir=str(folder))[-1]
    return counted


@pytest.mark.parametrize("case", [*FAST, *slow(SLOW)], ids=str)
def test_update_waits_for_the_device_no_more_often_than_known(found: dict[Case, Update], case: Case) -> None:
    assert found[case] == (FAST | SLOW)[case]


def count_waits(mesh: Mesh, cases: list[Case], work_dir: str) -> dict[Case, Update]:
    """Return the waits of the last rank, which is in the last stage."""
    from tests.helpers.device_waits import background_device

    found = {}
    with background_device() as waits:
        for number, case in enumerate(cases):
            few, many = (_of_update(mesh, case, waits, Path(work_dir) / f"{number}-{n}", n) for n in (2, 4))
            per_micro = [(after - before) // 2 for before, after in zip(few, many, strict=True)]
            besides = [all_of - 2 * each for all_of, each in zip(few, per_micro, strict=True)]
            found[case] = Update(Waits(*per_micro), Waits(*besides))
    return found


def _of_update(mesh: Mesh, case: Case, waits: Any, run_dir: Path, micro_batches: int) -> Waits:
    layout = Layout(case.encoding, pipeline=case.pipeline, precision=case.precision)
    run = run_config(layout, run_dir)
    rows = micro_batches * layout.micro * mesh.with_layout(run.parallel).data_ranks
    run = run.model_copy(update={"train": run.train.model_copy(update={"global_batch": rows})})
    engine, mesh = start_engine_of(run, mesh, case.zero)
    for step in range(WARM_UP + 1):
        inputs = batches(step, mesh, rows)
        waits.clear()
        engine.train_step(inputs, LR)
    if case.pipeline > 1:
        assert not engine._engine.timers("train_batch").event_timers, "each step would leave two CUDA events"
    return Waits(waits["synchronize"], waits["read"], waits["from host"])
