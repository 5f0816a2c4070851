"""Reaction of all ranks to NaN in data, gradient and weights and to a spike of the loss, and the recorded events."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.run_files import read_events
from tests.helpers.docs import assert_events_are_documented
from tests.helpers.faults import SampleFault
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import metrics, state, train_in_rank
from tests.helpers.tiers import selected, slow

STEPS, BATCH = 12, 8
SETTINGS = ("train.save_every=2", "health.patience=3", "health.spike_window=4", "train.log_every=3")
LAYOUTS = {"data": ((), 1), "stages": (("parallel.pipeline=2",), 0), "tensor": (("parallel.tensor=2",), 2)}
# Samples 40 to 63 are those of steps 6 to 8; the last checkpoint before is that of step 4.
FAULTS = {
    "loss": SampleFault("loss", 1, 40, 64),
    "spike": SampleFault("spike", 1, 40, 64),
    "weight": SampleFault("weight", 1, 40, 48, once=True),
    "gradient": SampleFault("gradient", 1, 40, 48),
    "none": None,
}


class Case(NamedTuple):
    """A fault in a layout."""

    fault: str
    layout: str


FAST = [Case(fault, "data") for fault in FAULTS] + [Case("weight", "stages"), Case("none", "tensor")]
SLOW = [Case(fault, layout) for layout in ("stages", "tensor") for fault in FAULTS if fault != "spike"]


def cases(*faults: str) -> list[Any]:
    fast = [case for case in FAST if case.fault in faults]
    return [*fast, *slow(case for case in SLOW if case.fault in faults and case not in fast)]


def train_cases(mesh: Mesh, chosen: list[Case], data: str, work_dir: str) -> dict[Case, list[int]]:
    """Train every case from start to end; return the first samples of its steps on this rank, in order."""
    read = {}
    for case in chosen:
        settings, zero = LAYOUTS[case.layout]
        run_dir = f"{work_dir}/{case.fault}-{case.layout}"
        read[case] = list(
            train_in_rank(mesh, data, run_dir, (*SETTINGS, *settings), zero, STEPS, STEPS, FAULTS[case.fault])
        )
    return read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def read(request: pytest.FixtureRequest, folder: Path, train_and_valid: Path) -> Any:
    chosen = selected(request, "case")
    faultless = [Case("none", case.layout) for case in chosen if case.fault == "gradient"]
    chosen = list(dict.fromkeys([*chosen, *faultless]))
    chosen.sort(key=lambda case: case.layout != "data")  # first, since DeepSpeed keeps the groups of an earlier engine
    return run_ranks(train_cases, 2, folder / "ranks", chosen=chosen, data=str(train_and_valid), work_dir=str(folder))


def _events(folder: Path, case: Case, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / f"{case.fault}-{case.layout}") if event["event"] == kind]


@pytest.mark.parametrize("case", cases("loss", "spike", "weight"), ids=str)
def test_consecutive_faults_roll_back_and_skip_their_samples_on_all_ranks(folder: Path, read: Any, case: Case) -> None:
    bad = _events(folder, case, "bad step")
    assert [(event["step"], event["samples"]) for event in bad] == [(6, [40, 48]), (7, [48, 56]), (8, [56, 64])]
    assert all(len(set(event["windows"])) == BATCH for event in bad)
    (back,) = _events(folder, case, "return")
    assert (back["step"], back["to_step"], back["samples"]) == (8, 4, [40, 64])
    run_dir = folder / f"{case.fault}-{case.layout}"
    assert_events_are_documented(run_dir)
    found = [line for line in metrics(run_dir) if "loss/train_nats" in line]
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line["data/samples"] for line in found] == [*range(8, 41, 8), *range(72, 121, 8)]
    assert all(torch.isfinite(tensor).all() for tensor in state(run_dir).values())
    for rank in read:
        assert set(rank[case]) == set(range(0, 40, 8)) | {40, 48, 56} | set(range(64, 120, 8))


@pytest.mark.parametrize("case", cases("gradient"), ids=str)
def test_single_bad_gradient_is_skipped_and_recorded(folder: Path, read: Any, case: Case) -> None:
    (bad,) = _events(folder, case, "bad step")
    assert bad["step"] == 6 and bad["samples"] == [40, 48] and "not finite" in bad["reason"]
    assert _events(folder, case, "return") == []
    found = metrics(folder / f"{case.fault}-{case.layout}")
    assert [line["data/samples"] for line in found] == list(range(8, 8 * STEPS + 1, 8))
    faultless = metrics(folder / f"none-{case.layout}")
    assert found[:5] == faultless[:5]
    assert found[6]["loss/train_nats"] != faultless[6]["loss/train_nats"]  # one update is missing


@pytest.mark.parametrize("case", cases("none"), ids=str)
def test_without_a_fault_nothing_is_bad(folder: Path, read: Any, case: Case) -> None:
    events = [event["event"] for event in read_events(folder / f"none-{case.layout}")]
    assert events[0] == "start" and events[-1] == "done" and not {"bad step", "return", "failed"} & set(events)
