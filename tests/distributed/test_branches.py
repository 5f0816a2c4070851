"""A branch of a run: trunk and branch together equal one run with the same schedule, bit for bit."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_bipe.checkpoint.find import list_steps, step_folder
from megatron_bipe.checkpoint.manifest import fingerprint_of
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.run_files import read_events
from tests.helpers.commands import options
from tests.helpers.docs import assert_events_are_documented
from tests.helpers.errors import assert_error
from tests.helpers.faults import SampleFault
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import losses, metrics, state, train_in_rank
from tests.helpers.tiers import selected, slow
from tests.helpers.tools import pretrain_error, run_pretrain

AT, STEPS = 4, 10
STABLE = "optimizer.warmup_steps=2", "optimizer.lr=3e-3", "train.valid_every=2", "train.valid_samples=8"
COOL_DOWN = "optimizer.decay=1-sqrt", f"optimizer.decay_start={AT}"
FAULT = SampleFault("loss", 1, 40, 56)  # of steps 6 and 7
LAYOUTS: dict[str, tuple[tuple[str, ...], int]] = {
    "data": ((), 1),
    "ZeRO 0": ((), 0),
    "ZeRO 3": ((), 3),
    "pipeline": (("parallel.pipeline=2",), 0),
    "tensor": (("parallel.tensor=2",), 2),
}
NAMES = ["data", "pipeline", *slow(["ZeRO 0", "ZeRO 3", "tensor"])]


class Part(NamedTuple):
    """A launch of one of the runs."""

    run_dir: str
    settings: tuple[str, ...]
    zero: int
    stop: int
    fault: SampleFault | None = None


def train_parts(mesh: Mesh, parts: list[Part], data: str) -> None:
    for part in parts:
        settings = (*STABLE, f"data.valid_path={data}/valid", *part.settings)
        train_in_rank(mesh, data, part.run_dir, settings, part.zero, STEPS, part.stop, part.fault)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, train_and_valid: Path) -> Path:
    """Return the folder of all runs: in each layout a trunk, a branch in three launches, and one run of both."""
    folder = tmp_path_factory.mktemp("branches")
    names = [name for name in LAYOUTS if name in selected(request, "name")]  # data parallelism first

    def train(run: str, stop: int, *settings: str, **fault: Any) -> list[Part]:
        saves = "train.save_every=100" if fault else "train.save_every=2"
        given = [(f"{folder}/{name}/{run}", name, *LAYOUTS[name]) for name in names]
        return [
            Part(run_dir, (saves, *layout, *(s.replace("LAYOUT", name) for s in settings)), zero, stop, **fault)
            for run_dir, name, layout, zero in given
        ]

    def launch(*parts: list[Part]) -> None:
        together = [part for parts_of_layout in zip(*parts, strict=True) for part in parts_of_layout]
        run_ranks(train_parts, 2, folder / "ranks", parts=together, data=str(train_and_valid))

    of_trunk = (*COOL_DOWN, f"train.branch_from={folder}/LAYOUT/trunk@{AT}")
    launch(
        train("trunk", AT + 2, "optimizer.decay=constant"),
        train("single", STEPS, *COOL_DOWN),
        train("branch", AT + 1, *of_trunk),
        train("rolled back", STEPS, *of_trunk, "health.patience=2", fault=FAULT),
    )
    for name in names:  # as if the branch had been killed before its first checkpoint
        shutil.rmtree(folder / name / "branch" / "checkpoints")
    launch(train("branch", AT + 3, *of_trunk))
    for name in names:  # a branch with a checkpoint does not need the trunk
        shutil.rmtree(step_folder(folder / name / "trunk", AT))
    launch(train("branch", STEPS, *of_trunk))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_trunk_and_branch_equal_one_run_bit_for_bit(folder: Path, name: str) -> None:
    trunk, branch, single = (folder / name / run for run in ("trunk", "branch", "single"))
    expected = metrics(single)
    of_trunk = [line for line in metrics(trunk) if line["step"] <= AT]
    assert [*of_trunk, *metrics(branch)] == expected
    assert min(line["step"] for line in metrics(branch)) == AT + 1
    assert [line["step"] for line in expected if "loss/train_nats" in line] == list(range(1, STEPS + 1))
    assert expected[-2]["optim/lr"] < expected[AT + 2]["optim/lr"]  # it cools down
    found, wanted = state(branch), state(single)
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.mark.parametrize("name", NAMES)
def test_starts_of_a_branch_record_where_it_begins(folder: Path, name: str) -> None:
    starts = [event for event in read_events(folder / name / "branch") if event["event"] == "start"]
    assert [start["step"] for start in starts] == [AT, AT, AT + 3]
    origins = [start.get("branch_from") for start in starts]
    assert origins[0] == origins[1] and origins[2] is None
    assert (origins[0]["run"], origins[0]["step"]) == (str(folder / name / "trunk"), AT)
    assert len(origins[0]["fingerprint"]) == 64
    assert_events_are_documented(folder / name / "branch")


@pytest.mark.parametrize("name", NAMES)
def test_branch_without_a_checkpoint_rolls_back_to_the_trunk(folder: Path, name: str) -> None:
    run_dir = folder / name / "rolled back"
    (back,) = [event for event in read_events(run_dir) if event["event"] == "return"]
    assert (back["step"], back["to_step"], back["samples"]) == (7, AT, [40, 56])
    found = [line for line in metrics(run_dir) if "loss/train_nats" in line]
    assert [line["step"] for line in found] == list(range(AT + 1, STEPS + 1))
    assert [line["data/samples"] for line in found] == [40, *range(64, 97, 8)]
    assert list_steps(run_dir) == [STEPS]


def test_pretrain_branches_resumes_and_refuses(tmp_path: Path, train_and_valid: Path) -> None:
    """Ask one trunk many things, since each launch takes seconds."""
    data, trunk, run_dir = train_and_valid / "train", tmp_path / "trunk", tmp_path / "branch"
    constant = options(data, trunk, "optimizer.decay=constant", "train.save_every=2", steps=4)
    run_pretrain(constant, tmp_path / "first")

    def branch(*settings: str, folder: Path = run_dir, step: int = 2, data: Path = data, steps: int = 5) -> list[str]:
        decay = "optimizer.decay=1-sqrt", f"optimizer.decay_start={step}"
        return options(data, folder, *decay, f"train.branch_from={trunk}@{step}", *settings, steps=steps)

    [planned] = run_pretrain([*branch(), "--dry-run"], tmp_path / "dry")
    assert "branch_from" in planned.output and not run_dir.exists()
    for arguments, kind, observed in (
        (branch(step=3), CheckpointError, ["2, 4", 3]),
        (branch(steps=2, step=1), CheckpointError, [1]),
        (branch("model.num_layers=1"), CheckpointError, ["model.num_layers"]),
        (branch("train.seed=1"), CheckpointError, ["train.seed"]),
        (branch("optimizer.lr=1e-3"), CheckpointError, ["optimizer.lr"]),
        (branch(data=train_and_valid / "valid"), CheckpointError, ["dataset"]),
        (branch(folder=trunk), ConfigError, ["train.branch_from"]),
        (branch(f"train.init_from={trunk}"), ConfigError, ["train.init_from"]),
    ):
        for more in ([], ["--dry-run"]):
            assert_error(pretrain_error(*arguments, *more), kind, *observed)
    assert not list_steps(run_dir) and list_steps(trunk) == [2, 4] and len(losses(trunk)) == 4

    damaged = tmp_path / "damaged" / "checkpoints"
    shutil.copytree(trunk / "checkpoints", damaged)
    shutil.copy(trunk / "config.yaml", damaged.parent)
    file = step_folder(damaged.parent, 2) / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    [refused] = run_pretrain(branch(f"train.branch_from={damaged.parent}@2"), tmp_path / "bad", code=2)
    assert file.name in refused.output and "Traceback" not in refused.output

    [first] = run_pretrain([*branch(), "--stop-step", 4], tmp_path / "second")
    assert f"{trunk}@2" in first.output and "step 4 of 5" in first.output
    fingerprint = fingerprint_of(step_folder(trunk, 2))
    shutil.rmtree(trunk)
    [second] = run_pretrain(branch(), tmp_path / "third")
    assert "continuing" in second.output and f"step-{5:08d}" in second.output
    starts = [event for event in read_events(run_dir) if event["event"] == "start"]
    origin = {"run": str(trunk), "step": 2, "fingerprint": fingerprint}
    assert [(start["step"], start.get("branch_from")) for start in starts[-2:]] == [(2, origin), (4, None)]
    assert [line["step"] for line in metrics(run_dir)] == [3, 4, 5]
