"""A run that continues in another layout or on other ranks reads the same samples in every step, past bad ones too."""

from pathlib import Path
from typing import Any

import pytest

from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.faults import SampleFault
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import train_in_rank
from tests.helpers.tiers import selected, slow

STEPS, HALF = 12, 8
SETTINGS = ("train.save_every=4", "health.patience=2", "train.micro_batch=1")
FAULT = SampleFault("loss", 0, 40, 56)  # steps 6 and 7, so that the run rolls back to step 4 and skips them
CONTINUED = {  # ranks, layout, ZeRO
    "two tensor-parallel ranks": (2, ("parallel.tensor=2",), 2),
    "two stages": (2, ("parallel.pipeline=2",), 1),
    "four replicas": (4, (), 3),
    "two stages of two replicas": (4, ("parallel.pipeline=2",), 0),
    "two replicas, larger micro-batches": (2, ("train.micro_batch=4",), 1),
}


def _train(mesh: Mesh, data: str, runs: list[tuple[str, tuple[str, ...], int, int]]) -> list[tuple[int, Any]]:
    """Train each run; return the rank's data-parallel replica and the tokens that it read."""
    found = []
    for run_dir, settings, zero, stop in runs:
        fault = FAULT if stop == HALF or run_dir.endswith("uninterrupted") else None
        read = train_in_rank(mesh, data, run_dir, (*SETTINGS, *settings), zero, STEPS, stop, fault)
        parts = {"tensor": 1, "pipeline": 1} | {
            setting.removeprefix("parallel.").split("=")[0]: int(setting.split("=")[1])
            for setting in settings
            if setting.startswith("parallel.")
        }
        mesh_of_run = mesh._replace(tensor=parts["tensor"], pipeline=parts["pipeline"])
        found.append((mesh_of_run.data_rank, read))
    return found


def _samples(of_ranks: list[tuple[int, dict[int, Any]]]) -> dict[int, list[Any]]:
    """Return the sequences of each step after the first half, in sample order, from those that each replica read."""
    replicas = dict(of_ranks)
    for data_rank, read in of_ranks:
        assert read == replicas[data_rank]  # all ranks of a replica read the same
    return {
        first: [
            window
            for micro in zip(*(replicas[data_rank][first] for data_rank in sorted(replicas)), strict=True)
            for micro_batch in micro
            for window in micro_batch
        ]
        for first in replicas[0]
    }


FAST = ["two tensor-parallel ranks", "two replicas, larger micro-batches"]


@pytest.fixture(scope="module")
def samples(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, train_and_valid: Path) -> Any:
    """Return the samples of each resumed run, and those of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("layouts")
    data = str(train_and_valid)
    names = selected(request, "name")
    begin = [(str(folder / name), (), 1, HALF) for name in names] + [(str(folder / "uninterrupted"), (), 1, STEPS)]
    first = run_ranks(_train, 2, folder / "first", data=data, runs=begin)
    found = {"uninterrupted": _samples([rank[-1] for rank in first])}
    for ranks in sorted({CONTINUED[name][0] for name in names}):
        chosen = [name for name in names if CONTINUED[name][0] == ranks]
        chosen.sort(
            key=lambda name: "parallel" in str(CONTINUED[name][1])
        )  # pure data parallelism first, because of DeepSpeed's groups
        runs = [(str(folder / name), *CONTINUED[name][1:], STEPS) for name in chosen]
        results = run_ranks(_train, ranks, folder / f"second-{ranks}", data=data, runs=runs)
        found |= {name: _samples([rank[number] for rank in results]) for number, name in enumerate(chosen)}
    return found


@pytest.mark.parametrize("name", [*FAST, *slow(name for name in CONTINUED if name not in FAST)])
def test_resume_in_another_layout_reads_the_same_samples_in_every_step(samples: Any, name: str) -> None:
    uninterrupted, found = samples["uninterrupted"], samples[name]
    assert list(found) == [80, 88, 96, 104]  # 8 batches of 8, two that are skipped, then steps 9 to 12
    assert found == {first: uninterrupted[first] for first in found}
    assert list(uninterrupted) == [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104]
