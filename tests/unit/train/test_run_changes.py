"""What a run may change of its learning rate when it resumes, and what a branch may change of the other run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bipe.checkpoint.commit import begin, publish
from megatron_bipe.checkpoint.find import step_folder
from megatron_bipe.checkpoint.manifest import CheckpointInfo
from megatron_bipe.checkpoint.shard_files import write_index
from megatron_bipe.config import ALLOWABLE, RunConfig, dump_yaml
from megatron_bipe.config.load import load_run_config
from megatron_bipe.data.manifest import DataRecord, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.errors import BipeError, CheckpointError, ConfigError
from megatron_bipe.train.run_changes import check_branch, check_same_run
from megatron_bipe.train.run_folder import end_summary, resolve_precision
from tests.helpers.errors import raises

STEP = 20
BASE = ["optimizer.warmup_steps=5", "optimizer.decay=constant", "train.steps=30", "train.precision=bf16"]
COOL_DOWN = ["optimizer.decay=1-sqrt", f"optimizer.decay_start={STEP}", "train.steps=25"]


@pytest.fixture
def record() -> DataRecord:
    tokenizer = TokenizerRecord(name="t", fingerprint="a" * 64, vocab_size=100, special_ids={"bos": 1})
    return DataRecord(tokenizer=tokenizer, rule=SegmentRule(spec="[5]", token_ids=(5,)), fingerprint="c" * 64)


@pytest.fixture
def trunk(tmp_path: Path, record: DataRecord) -> Path:
    """Return the folder of a run with a checkpoint of step 20."""
    write(configured(tmp_path / "trunk"), record)
    return tmp_path / "trunk"


def configured(run_dir: Path, *settings: str) -> RunConfig:
    return load_run_config(None, [f"run_dir={run_dir}", *BASE, *settings])


def write(run: RunConfig, record: DataRecord, step: int = STEP, **changes: Any) -> None:
    folder = begin(run.run_dir, step, "test", 0)
    config = run.model_dump(mode="json") | changes
    write_index(folder, CheckpointInfo(step, step, {"ranks": 1}, config, record, {}), {})
    publish(folder, run.run_dir, step, {})
    (run.run_dir / "config.yaml").write_text(dump_yaml(run))
    (run.run_dir / "data.json").write_text(record.model_dump_json(exclude_defaults=True))


def branch(trunk: Path, *settings: str, step: object = STEP) -> RunConfig:
    return configured(trunk.with_name("branch"), f"train.branch_from={trunk}@{step}", *settings)


@pytest.mark.parametrize(
    ("before", "after", "observed"),
    [
        ([], ["train.steps=60"], ()),
        ([], COOL_DOWN, ()),
        (COOL_DOWN, [], ()),
        (COOL_DOWN, [*COOL_DOWN, "train.steps=60", "optimizer.min_lr=1e-5"], ()),
        ([], ["optimizer.min_lr=1e-5"], ()),
        ([], [*COOL_DOWN, "optimizer.decay_start=19", "optimizer.min_lr=1e-6"], ()),  # update 20 still has lr
        ([], [*COOL_DOWN, "optimizer.decay_start=18"], ("optimizer.decay_start", "optimizer.decay", 18, 20)),
        ([], ["optimizer.lr=2e-4"], ("optimizer.lr", "0.0001", "0.0002", 2)),
        (["optimizer.decay=cosine"], ["optimizer.decay=cosine", "train.steps=60"], (30, 60, "train.steps", 7)),
    ],
)
def test_same_run_changes_only_rates_of_later_updates_freely(
    trunk: Path, record: DataRecord, before: list[str], after: list[str], observed: tuple[object, ...]
) -> None:
    write(configured(trunk, *before), record)
    changed = configured(trunk, *after)
    check_same_run(changed, record, ["optimizer"])
    if observed:
        with raises(CheckpointError, *observed, location=trunk, remedy="--allow optimizer"):
            check_same_run(changed, record)
    else:
        check_same_run(changed, record)


def test_same_run_other_fields_of_the_optimizer_need_permission_whatever_the_step(
    trunk: Path, record: DataRecord
) -> None:
    with raises(CheckpointError, "optimizer.weight_decay", remedy="--allow optimizer"):
        check_same_run(configured(trunk, "optimizer.weight_decay=0.5"), record)


def test_branch_may_change_what_a_resumed_run_may_and_its_start(trunk: Path, record: DataRecord) -> None:
    write(configured(trunk, "train.init_from=some/model"), record)
    free = ["train.save_every=3", "parallel.tensor=2", "train.micro_batch=4", "data.path=moved"]
    check_branch(branch(trunk, *COOL_DOWN, *free), record)
    check_branch(branch(trunk, *COOL_DOWN), None)
    check_branch(configured(trunk.with_name("new")), record)  # not a branch
    assert not trunk.with_name("branch").exists()


def test_branch_counts_the_settings_of_the_checkpoint_not_those_of_later_starts(
    trunk: Path, record: DataRecord
) -> None:
    (trunk / "config.yaml").write_text(dump_yaml(configured(trunk, "optimizer.weight_decay=0.5")))
    check_branch(branch(trunk), record)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        (["optimizer.lr=2e-4"], "optimizer"),
        ([*COOL_DOWN, "optimizer.decay_start=10"], "optimizer"),
        (["optimizer.betas=[0.9, 0.95]"], "optimizer"),
        (["train.precision=fp32"], "train.precision"),
        ([], "data"),
    ],
)
def test_branch_of_changed_settings_needs_permission_by_name(
    trunk: Path, record: DataRecord, settings: list[str], allowed: str
) -> None:
    data = record.model_copy(update={"fingerprint": "d" * 64}) if allowed == "data" else record
    observed = [setting.partition("=")[0] for setting in settings[:1]] or ["c" * 12, "d" * 12]
    asked = branch(trunk, *settings)
    for others in ((), [name for name in ALLOWABLE if name != allowed]):
        with raises(CheckpointError, *observed, location=step_folder(trunk, STEP), remedy=f"--allow {allowed}"):
            check_branch(asked, data, others)
    check_branch(asked, data, [allowed])


@pytest.mark.parametrize(
    "setting", ["model.num_layers=2", "train.seed=1", "train.global_batch=8", "train.seq_len_tokens=512"]
)
def test_branch_of_another_model_or_order_is_never_allowed(trunk: Path, record: DataRecord, setting: str) -> None:
    with raises(CheckpointError, *setting.split("="), location=step_folder(trunk, STEP)) as error:
        check_branch(branch(trunk, setting), record, ALLOWABLE)
    assert "--allow" not in str(error.value)


@pytest.mark.parametrize("field", ["tokenizer", "rule"])
def test_branch_on_another_tokenizer_or_rule_is_never_allowed(trunk: Path, record: DataRecord, field: str) -> None:
    tokenizer = record.tokenizer.model_copy(update={"fingerprint": "e" * 64})
    other = {"tokenizer": tokenizer, "rule": SegmentRule(spec="[6]", token_ids=(6,))}[field]
    observed = {"tokenizer": "e" * 12, "rule": "[6]"}[field]
    with raises(CheckpointError, observed, location=step_folder(trunk, STEP)):
        check_branch(branch(trunk), record.model_copy(update={field: other}), ALLOWABLE)


@pytest.mark.parametrize(
    ("source", "kind", "observed"),
    [
        ("trunk@19", CheckpointError, ["19", "20"]),
        ("trunk", CheckpointError, ["no step", "20"]),
        ("trunk@", CheckpointError, ["no step", "20"]),
        ("absent@20", CheckpointError, []),
        ("branch@20", ConfigError, ["branch@20"]),
        ("trunk/../branch@20", ConfigError, ["branch@20"]),
        ("branch", ConfigError, ["branch"]),
    ],
)
def test_branch_from_what_is_not_a_checkpoint_of_another_run_is_refused(
    trunk: Path, record: DataRecord, source: str, kind: type[BipeError], observed: list[str]
) -> None:
    with raises(kind, *observed):
        check_branch(configured(trunk.with_name("branch"), f"train.branch_from={trunk.parent}/{source}"), record)


def test_branch_from_its_own_folder_is_refused_even_where_it_would_resume(trunk: Path, record: DataRecord) -> None:
    with raises(ConfigError, f"{trunk}@{STEP}", location="train.branch_from", remedy="run_dir"):
        check_branch(configured(trunk, f"train.branch_from={trunk}@{STEP}", *COOL_DOWN), record)


def test_branch_that_would_end_where_it_begins_is_refused(trunk: Path, record: DataRecord) -> None:
    with raises(ConfigError, f"train.steps={STEP}", STEP, location="train.steps"):
        check_branch(branch(trunk, f"train.steps={STEP}"), record)


def test_branch_from_a_damaged_checkpoint_is_refused(trunk: Path, record: DataRecord) -> None:
    index = step_folder(trunk, STEP) / "state.json"
    index.write_text(index.read_text().replace("20", "21"))
    with raises(CheckpointError, "state.json", location=step_folder(trunk, STEP)):
        check_branch(branch(trunk), record)
    write(configured(trunk), record, 10, train={"steps": "many"})
    with raises(CheckpointError, "configuration", location=step_folder(trunk, 10)):
        check_branch(branch(trunk, step=10), record)


def test_branch_with_its_own_checkpoint_does_not_need_the_trunk(trunk: Path, record: DataRecord) -> None:
    asked = branch(trunk, *COOL_DOWN)
    write(asked, record, 22)
    trunk.rename(trunk.with_name("gone"))
    check_branch(asked, record)
    check_same_run(asked, record)


def test_branch_keeps_the_precision_of_the_trunk(trunk: Path) -> None:
    asked = branch(trunk, "train.precision=auto")
    _, choice = resolve_precision(asked, torch.device("cpu"))
    assert choice.precision == "bf16" and f"{trunk}@{STEP}" in choice.reason
    settled, choice = resolve_precision(branch(trunk, "train.precision=fp32"), torch.device("cpu"))
    assert settled.train.precision == choice.precision == "fp32"  # which `check_branch` refuses
    resolve_precision(branch(trunk, "train.precision=auto", step=19), torch.device("cpu"))  # `check_branch` does, too


def test_end_summary_of_a_branch_that_was_not_trained_states_the_step_of_its_trunk(trunk: Path) -> None:
    assert f"step {STEP} of 25" in end_summary(branch(trunk, *COOL_DOWN), 10)
    assert "step 22 of 25" in end_summary(branch(trunk, *COOL_DOWN), 22)
