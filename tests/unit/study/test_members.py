"""Members of a study, all problems of its file in one error, and runs that differ from it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bipe.config import ENCODINGS
from megatron_bipe.errors import ConfigError
from megatron_bipe.study import Plan, check_runs, load_plan
from tests.helpers.errors import raises
from tests.helpers.paths import ROOT
from tests.unit.study.conftest import BASE, WriteRun, WriteStudy

EXAMPLES = ROOT / "examples" / "studies"


def test_members_are_all_combinations_in_the_order_of_the_grid(write_study: WriteStudy) -> None:
    grid = {"model.encoding": ["bipe_rope", "rope"], "data.segments": ["reference", "fixed:16"], "optimizer.lr": [1e-3]}
    plan = load_plan(write_study(grid=grid, exclude=[{"model.encoding": "rope", "data.segments": "fixed:16"}]))
    assert [member.name for member in plan.members] == [
        "bipe_rope-reference-0.001",
        "bipe_rope-fixed-16-0.001",
        "rope-reference-0.001",
    ]
    member = plan.members[1]
    assert member.run.data.segments == "fixed:16" and member.run.optimizer.lr == 1e-3
    assert member.settings == ["model.encoding=bipe_rope", "data.segments=fixed:16", "optimizer.lr=0.001"]
    assert plan.rules == ["reference", "fixed:16"]


def test_folders_are_those_that_published_studies_have(write_study: WriteStudy) -> None:
    grid = {"model.encoding": ["bipe_rope"], "data.segments": ["reference", "fixed:16"]}
    plan = load_plan(write_study(grid=grid, seeds=[1, 7]))
    jobs = plan.jobs(Path("out"))
    assert [job.name for job in jobs] == [
        "bipe_rope-reference/seed-1",
        "bipe_rope-fixed-16/seed-1",
        "bipe_rope-reference/seed-7",
        "bipe_rope-fixed-16/seed-7",
    ]
    assert jobs[1].checkpoint == Path("out/runs/bipe_rope-fixed-16/seed-1/checkpoints/step-00000004")
    assert jobs[1].evaluation == Path("out/evaluation/bipe_rope-fixed-16/seed-1")
    folders = plan.data_folders(jobs[1].member, Path("out"))
    assert folders == (Path("out/data/fixed-16/train"), Path("out/data/fixed-16/valid"))


def test_lengths_end_where_an_encoding_does(write_study: WriteStudy) -> None:
    grid = {"model.encoding": ["rope", "learned"]}
    rope, learned = load_plan(write_study(grid=grid, evaluate={"multiples": [1, 2, 4]})).members
    assert (rope.lengths, learned.lengths) == ((16, 32, 64), (16,))


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (None, [None, "rope-0.1", "rope-0.1", "rope-0.1"]),
        ("alibi-0.2", ["alibi-0.2", "alibi-0.2", "alibi-0.2", None]),
        ({"optimizer.weight_decay": 0.2}, ["rope-0.2", None, "alibi-0.2", None]),
    ],
)
def test_reference_is_a_member_or_values_of_the_grid(
    write_study: WriteStudy, reference: Any, expected: list[str | None]
) -> None:
    grid = {"model.encoding": ["rope", "alibi"], "optimizer.weight_decay": [0.1, 0.2]}
    plan = load_plan(write_study(grid=grid, reference=reference))
    found = [plan.reference_of(member) for member in plan.members]
    assert [other and other.name for other in found] == expected


def test_reference_that_is_not_kept_is_not_replaced_by_another(write_study: WriteStudy) -> None:
    plan = load_plan(write_study(reference="rope"), only=["bipe_rope"])
    assert [member.name for member in plan.members] == ["bipe_rope"]
    assert plan.reference_of(plan.members[0]) is None


def test_all_problems_of_a_file_are_one_error(write_study: WriteStudy) -> None:
    wrong = {
        "grid": {"model.encoding": ["rope", "ropes", "learned"], "optimizer.lr": [1]},
        "seeds": [1, 2, 1],
        "evaluate": {"lengths": [32, 64]},
        "titel": "x",
        "reference": "none",
        "launch": {"ranks": 0},
    }
    observed = ["titel", "seeds", "ropes", "learned-1", 16, "reference='none'", "launch.ranks=0"]
    with raises(ConfigError, *observed, location="study.yaml"):
        load_plan(write_study(**wrong))


@pytest.mark.parametrize(
    ("changes", "observed"),
    [
        ({"grid": {}}, ["grid"]),
        ({"grid": {"model.encoding": []}}, ["grid.model.encoding"]),
        ({"grid": {"model.encodings": ["rope"]}}, ["model.encodings", "model.encoding"]),
        ({"grid": {"model.encoding": ["rope", "rope"]}}, ["rope is named more than once"]),
        ({"grid": {"data.segments": ["fixed:16", "fixed-16"]}}, ["fixed-16 is the name of two members"]),
        ({"grid": {"train.seed": [1]}}, ["train.seed"]),
        ({"grid": {"data.valid_path": ["a"]}}, ["data.valid_path"]),
        ({"grid": {"model.num_heads": [3]}}, ["model.num_heads=3", 32]),
        ({"set": {"model.encoding": "rope"}}, ["model.encoding is in `set` and in `grid`"]),
        ({"set": {"train.steps": "none"}}, ["train.steps", "none"]),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": [-1]}, ["seeds"]),
        ({"evaluate": {"lengths": [1]}}, ["evaluate.lengths", 1]),
        ({"evaluate": {"lengths": [32, 32]}}, ["32 is named more than once"]),
        ({"evaluate": {"lengths": [16, 99]}, "grid": {"model.encoding": ["learned"]}}, ["supports 99 tokens"]),
        ({"evaluate": {"protocol": "fast"}}, ["evaluate.protocol", "fast"]),
        ({"exclude": [{"model.encoding": "rope"}, {"model.encoding": "bipe_rope"}]}, ["exclude"]),
        ({"exclude": [{"optimizer.lr": 1}]}, ["optimizer.lr"]),
        ({"reference": {"model.encoding": "alibi"}}, ["reference", "alibi"]),
        ({"data": None}, ["data.valid_path", "corpus"]),
        ({"base": "none.yaml"}, ["none.yaml"]),
        ({"title": None}, ["title"]),
    ],
)
def test_wrong_file_is_one_error(write_study: WriteStudy, changes: dict[str, Any], observed: list[object]) -> None:
    location = "study.yaml"
    with raises(ConfigError, *observed, location=location):
        load_plan(write_study(**changes))


def test_wrong_options_are_one_error(write_study: WriteStudy) -> None:
    with raises(ConfigError, "alibi", location="study.yaml"):
        load_plan(write_study(), only=["alibi"])
    for setting in ("model.encoding=alibi", "train.seed=3"):
        with raises(ConfigError, setting, location="study.yaml"):
            load_plan(write_study(), [setting])


def test_base_with_its_own_data_needs_both_datasets(write_study: WriteStudy, tmp_path: Path) -> None:
    study = write_study(data=None)
    base = BASE | {"data": {"path": "a/train", "valid_path": "a/valid"}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    plan = load_plan(study)
    assert not plan.makes_data
    assert plan.data_folders(plan.members[0], Path("out")) == (Path("a/train"), Path("a/valid"))


def test_runs_that_are_as_planned_are_accepted(plan: Plan, write_run: WriteRun, tmp_path: Path) -> None:
    jobs = plan.jobs(tmp_path)
    write_run(jobs[0])
    write_run(jobs[3])
    check_runs(plan, jobs)


def test_runs_that_differ_in_more_than_grid_and_seed_are_one_error(
    plan: Plan, write_run: WriteRun, tmp_path: Path
) -> None:
    rope, bipe, rope_2, bipe_2, rope_3, _ = jobs = plan.jobs(tmp_path)
    write_run(rope)
    write_run(bipe, global_batch=8)
    write_run(rope_2, seed=5)
    write_run(bipe_2._replace(member=rope.member, folder=tmp_path / "other"))
    (bipe_2.run_dir).parent.mkdir(exist_ok=True)
    (tmp_path / "other" / "runs" / "rope" / "seed-2").rename(bipe_2.run_dir)
    write_run(rope_3, rule="newline")
    observed = ["bipe_rope/seed-1", "train.global_batch", 8, 4, "rope/seed-2", "train.seed", 5]
    observed += ["bipe_rope/seed-2", "model.encoding", "rope/seed-3", "data.segments", "newline"]
    with raises(ConfigError, *observed) as caught:
        check_runs(plan, jobs)
    assert "rope/seed-1: " not in caught.value.message.replace("bipe_rope/seed-1: ", "")


def test_runs_of_two_precisions_are_an_error(plan: Plan, write_run: WriteRun, tmp_path: Path) -> None:
    jobs = plan.jobs(tmp_path)
    write_run(jobs[0])
    write_run(jobs[1], precision="bf16")
    with raises(ConfigError, "train.precision", "fp32", "bf16"):
        check_runs(plan, jobs)


def test_runs_trained_on_other_data_are_an_error(
    plan: Plan, write_run: WriteRun, tmp_path: Path, text_dataset: Path
) -> None:
    jobs = plan.jobs(tmp_path)
    write_run(jobs[0])
    (tmp_path / "data" / "reference").mkdir(parents=True)
    (tmp_path / "data" / "reference" / "train").symlink_to(text_dataset)
    with raises(ConfigError, "rope/seed-1", "data/reference/train"):
        check_runs(plan, jobs)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_shipped_study_is_possible(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = load_plan(EXAMPLES / name)
    assert plan.study.seeds == (1, 2, 3)
    assert any(plan.reference_of(member) for member in plan.members)


def test_shipped_study_of_encodings_has_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    members = load_plan(EXAMPLES / "encodings.yaml").members
    assert {member.name for member in members} == set(ENCODINGS)
