"""A run folder is created once, resumed, and never mixed with another run."""

import json

import pytest
import torch

from megatron_bipe import io
from megatron_bipe.checkpoint.find import read_data_record, step_folder
from megatron_bipe.config import ALLOWABLE
from megatron_bipe.config.load import load_run_config
from megatron_bipe.data.manifest import BlendMember, DataRecord, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import CheckpointError, ConfigError, DataError
from megatron_bipe.runtime import hardware
from megatron_bipe.runtime.environment import Bf16Support
from megatron_bipe.runtime.gpus import named_gpu
from megatron_bipe.train.run_changes import _FREE, check_same_run
from megatron_bipe.train.run_folder import lock_run_dir, resolve_precision, write_run_folder
from tests.helpers.errors import raises
from tests.helpers.paths import ROOT


@pytest.fixture
def record():
    tokenizer = TokenizerRecord(name="t", fingerprint="a" * 64, vocab_size=100, special_ids={"bos": 1})
    return DataRecord(tokenizer=tokenizer, rule=SegmentRule(spec="[5]", token_ids=(5,)), fingerprint="c" * 64)


@pytest.fixture
def run(tmp_path, record, write_text_dataset):
    write_text_dataset(tmp_path / "dataset", [["a b"]])
    run = load_run_config(None, [f"run_dir={tmp_path / 'run'}", "train.precision=bf16"])
    write_run_folder(run, record, load_tokenizer(tmp_path / "dataset" / "tokenizer"))
    return run


def _checkpoint(run, step):
    step_folder(run.run_dir, step).mkdir(parents=True)
    (run.run_dir / "checkpoints" / "latest").write_text(step_folder(run.run_dir, step).name + "\n")


@pytest.mark.parametrize(
    ("asked", "has_checkpoint", "allow", "is_native", "precision"),
    [
        ("auto", False, (), True, "bf16"),
        ("auto", False, (), False, "fp32"),
        ("auto", True, (), False, "bf16"),  # the run started on a machine without native bf16
        ("auto", True, ("train.precision",), False, "fp32"),
        ("auto", True, ("train.precision",), True, "bf16"),
        ("fp32", True, (), True, "fp32"),  # which check_same_run then refuses
        ("bf16", False, (), False, "bf16"),
    ],
)
def test_settle_precision_of_auto_is_the_hardwares_until_there_is_a_checkpoint(
    run, monkeypatch, caplog, asked, has_checkpoint, allow, is_native, precision
):
    monkeypatch.setattr(hardware, "bf16_support", lambda _: Bf16Support(is_native, "REASON"))
    if has_checkpoint:
        _checkpoint(run, 10)
    same = load_run_config(None, [f"run_dir={run.run_dir}", f"train.precision={asked}"])
    settled, choice = resolve_precision(same, torch.device("cpu"), allow)
    assert settled.train.precision == choice.precision == precision
    assert settled == same.model_copy(update={"train": same.train.model_copy(update={"precision": precision})})
    assert (str(run.run_dir) in choice.reason) == (asked == "auto" and has_checkpoint and not allow)
    assert ("REASON" in caplog.text) == (precision == "bf16" and not is_native)


@pytest.mark.parametrize(
    ("asked", "has_checkpoint", "precision", "named"),
    [
        ("auto", False, "bf16", "H100"),
        ("fp32", False, "fp32", "train.precision"),
        ("bf16", False, "bf16", "train.precision"),
        ("auto", True, "bf16", "run"),
    ],
)
def test_settle_precision_of_auto_is_that_of_a_planned_gpu_until_there_is_a_checkpoint(
    run, monkeypatch, caplog, asked, has_checkpoint, precision, named
):
    monkeypatch.setattr(hardware, "bf16_support", lambda _: Bf16Support(False, "REASON"))
    if has_checkpoint:
        _checkpoint(run, 10)
    same = load_run_config(None, [f"run_dir={run.run_dir}", f"train.precision={asked}"])
    settled, choice = resolve_precision(same, torch.device("cpu"), planned_gpu=named_gpu("H100", "--gpu"))
    assert settled.train.precision == choice.precision == precision
    assert named in choice.reason and ("H100" in choice.reason) == (named == "H100")
    assert not caplog.records  # of slow bf16 on this machine


def test_settled_precision_is_what_the_run_folder_keeps(run, record, monkeypatch):
    monkeypatch.setattr(hardware, "bf16_support", lambda _: Bf16Support(True, ""))
    settled, _ = resolve_precision(load_run_config(None, [f"run_dir={run.run_dir}"]), torch.device("cpu"))
    _checkpoint(run, 10)
    check_same_run(settled, record)
    assert load_run_config(run.run_dir / "config.yaml").train.precision == "bf16"


def test_same_run_without_a_checkpoint_may_be_any(run, record):
    check_same_run(load_run_config(None, [f"run_dir={run.run_dir}", "model.num_layers=2"]), record)


def test_same_run_is_continued(run, record):
    _checkpoint(run, 10)
    check_same_run(run, record)
    assert (run.run_dir / "tokenizer" / "tokenizer.json").is_file()
    assert read_data_record(run.run_dir) == record


def test_same_run_harmless_changes_need_no_permission(run, record):
    _checkpoint(run, 10)
    settings = [
        "train.micro_batch=4",
        "train.compile=off",
        "parallel.tensor=4",
        "checkpoint.keep_last=2",
        "data.verify=false",
    ]
    check_same_run(load_run_config(None, [f"run_dir={run.run_dir}", "train.precision=bf16", *settings]), record)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        (["optimizer.lr=2e-4", "optimizer.decay=cosine"], "optimizer"),
        (["train.precision=fp32"], "train.precision"),
        ([], "data"),
    ],
)
def test_same_run_allowable_changes_need_permission_by_name(run, record, settings, allowed):
    _checkpoint(run, 10)
    changed = load_run_config(None, [f"run_dir={run.run_dir}", "train.precision=bf16", *settings])
    data = record.model_copy(update={"fingerprint": "d" * 64}) if allowed == "data" else record
    observed = [setting.partition("=")[0] for setting in settings] or ["c" * 12, "d" * 12]
    for others in ((), [name for name in ALLOWABLE if name != allowed]):
        with raises(CheckpointError, *observed, location=run.run_dir, remedy=f"--allow {allowed}"):
            check_same_run(changed, data, others)
    check_same_run(changed, data, [allowed])


LATER, KEPT = "train.steps=600000", "optimizer.decay_steps=500000"  # the default of train.steps
COSINE, CONSTANT = "optimizer.decay=cosine", "optimizer.decay=constant"


@pytest.mark.parametrize(
    ("before", "after", "is_named"),
    [
        ([], [LATER], True),
        ([], ["train.steps=400000"], True),
        ([COSINE], [COSINE, LATER], True),
        ([], ["optimizer.decay_steps=600000"], True),
        ([KEPT], [LATER], True),
        ([], [LATER, KEPT], False),
        ([KEPT], [KEPT, LATER], False),
        ([], [KEPT], False),
        ([CONSTANT], [CONSTANT, LATER], False),
        ([CONSTANT], [CONSTANT, KEPT], False),  # without effect
    ],
)
def test_same_run_end_of_the_decay_changes_only_with_permission(tmp_path, record, run, before, after, is_named):
    base = [f"run_dir={run.run_dir}", "train.precision=bf16"]
    old, new = load_run_config(None, [*base, *before]), load_run_config(None, [*base, *after])
    write_run_folder(old, record, load_tokenizer(tmp_path / "dataset" / "tokenizer"))
    _checkpoint(run, 20_000)  # after the warm-up
    check_same_run(new, record, ["optimizer"])
    if is_named:
        observed = ("train.steps" if before != [KEPT] else "optimizer.decay_steps", 500_000, new.decay_end)
        with raises(CheckpointError, *observed, KEPT, location=run.run_dir, remedy="--allow optimizer"):
            check_same_run(new, record, ["data"])
    else:
        check_same_run(new, record)


@pytest.mark.parametrize("setting", ["model.num_layers=2", "train.seed=1", "train.global_batch=8"])
def test_same_run_what_gives_the_state_another_meaning_is_never_allowed(run, record, setting):
    _checkpoint(run, 10)
    with raises(CheckpointError, *setting.split("="), location=run.run_dir) as error:
        check_same_run(load_run_config(None, [f"run_dir={run.run_dir}", setting]), record, ALLOWABLE)
    assert "--allow" not in str(error.value)


@pytest.mark.parametrize("field", ["tokenizer", "rule"])
def test_same_run_other_tokenizer_or_rule_is_never_allowed(run, record, field):
    _checkpoint(run, 10)
    rule = SegmentRule(spec="[6]", token_ids=(6,))
    tokenizer = record.tokenizer.model_copy(update={"fingerprint": "e" * 64})
    other = record.model_copy(update={field: {"tokenizer": tokenizer, "rule": rule}[field]})
    observed = {"tokenizer": ("a" * 12, "e" * 12), "rule": ("[5]", "[6]")}[field]
    with raises(CheckpointError, *observed, location=run.run_dir):
        check_same_run(run, other, ALLOWABLE)


def test_same_run_on_data_with_other_ids_of_special_tokens_in_text_is_never_allowed(run, record, tmp_path):
    _checkpoint(run, 10)
    plain, chat = (record.model_copy(update={"special_in_text": value}) for value in (False, True))
    check_same_run(run, plain)  # earlier versions did not record it
    write_run_folder(run, plain, load_tokenizer(tmp_path / "dataset" / "tokenizer"))
    assert read_data_record(run.run_dir) == plain
    check_same_run(run, record)
    with raises(CheckpointError, "with --special-in-text", "without --special-in-text", location=run.run_dir):
        check_same_run(run, chat, ALLOWABLE)


def test_same_run_unknown_name_to_allow_is_refused_even_at_the_start(run, record):
    with raises(ConfigError, "model.num_layers", "train.precision", location="--allow"):
        check_same_run(run, record, ["model.num_layers", "optimizer"])


def test_lock_run_dir_refuses_another_launch_until_it_is_released(run, record, monkeypatch):
    monkeypatch.setattr(io, "LOCK_WAIT_S", 0.0)
    with lock_run_dir(run, record, (), is_main=True):
        with lock_run_dir(run, record, (), is_main=False):
            pass
        with raises(DataError, location=run.run_dir), lock_run_dir(run, record, (), is_main=True):
            pass
    with lock_run_dir(run, record, (), is_main=True):
        assert (run.run_dir / "running" / "lock").exists()
    assert not (run.run_dir / "running").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_lock_run_dir_of_a_refused_start_leaves_no_folder_that_it_made(run, record, exists):
    folder = run.run_dir.with_name("new")
    if exists:
        folder.mkdir()
    refused = load_run_config(None, [f"run_dir={folder}", "train.branch_from=absent@10"])
    with raises(CheckpointError), lock_run_dir(refused, record, (), is_main=True):
        pass
    assert folder.exists() == exists


def test_lock_run_dir_removes_a_broken_save(run, record):
    broken = run.run_dir / "checkpoints" / "writing-step-00000010-ab"
    broken.mkdir(parents=True)
    with lock_run_dir(run, record, (), is_main=False):
        assert broken.exists()
    with lock_run_dir(run, record, (), is_main=True):
        assert not broken.exists()


def test_same_run_names_every_difference_of_another_run(run, record):
    _checkpoint(run, 10)
    changed = load_run_config(None, [f"run_dir={run.run_dir}", "model.num_layers=2", "optimizer.lr=2e-4"])
    other = record.model_copy(
        update={
            "fingerprint": "d" * 64,
            "rule": SegmentRule(spec="[6]", token_ids=(6,)),
            "tokenizer": record.tokenizer.model_copy(update={"fingerprint": "e" * 64}),
        }
    )
    settings = ("model.num_layers", 12, 2, "optimizer.lr", 1e-4, 2e-4)
    with raises(CheckpointError, *settings, "[5]", "[6]", "e" * 12, "d" * 12, location=run.run_dir):
        check_same_run(changed, other)


def _blend(record, *members):
    blend = [BlendMember(path=path, fingerprint=letter * 64, slots=slots) for path, letter, slots in members]
    return record.model_copy(update={"fingerprint": members[0][1] * 64, "blend": tuple(blend)})


BLEND = ("data/x", "1", 3000), ("data/y", "2", 7000)


def _continue(run, old, new, path="{data/x: 3, data/y: 7}"):
    _checkpoint(run, 10)
    (run.run_dir / "data.json").write_text(old.model_dump_json(exclude_defaults=True))
    check_same_run(load_run_config(None, [f"run_dir={run.run_dir}", "train.precision=bf16", f"data.path={path}"]), new)


@pytest.mark.parametrize("path", ["{data/x: 3, data/y: 7}", "{moved/x: 30, moved/y: 70}", "[moved/x, moved/y]"])
def test_same_run_same_blend_in_another_folder_is_continued(run, record, path):
    moved = _blend(record, *((folder.replace("data", "moved"), letter, slots) for folder, letter, slots in BLEND))
    _continue(run, _blend(record, *BLEND), moved, path)


@pytest.mark.parametrize(
    ("members", "observed"),
    [
        ([BLEND[0], ("new/y", "3", 7000)], ("data/y", "2" * 12, "new/y", "3" * 12)),
        (
            [("data/x", "1", 3001), ("data/y", "2", 6999)],
            ("data/x", "30.00%", "30.01%", "data/y", "70.00%", "69.99%"),
        ),
        ([BLEND[1], BLEND[0]], ("data/x", "1" * 12, "data/y", "2" * 12)),
        ([*BLEND, ("data/z", "3", 1)], ("2 datasets", "3 datasets")),
    ],
)
def test_same_run_changed_blend_names_the_member(run, record, members, observed):
    with raises(CheckpointError, *observed, location=run.run_dir, remedy="--allow data"):
        _continue(run, _blend(record, *BLEND), _blend(record, *members))


@pytest.mark.parametrize("back", [False, True])
def test_same_run_one_dataset_become_a_blend_or_back_is_refused(run, record, back):
    old, new = (_blend(record, *BLEND), record) if back else (record, _blend(record, *BLEND))
    sizes = ["one dataset", "2 datasets"]
    was, now = reversed(sizes) if back else sizes
    with raises(CheckpointError, was, now, location=run.run_dir) as error:
        _continue(run, old, new)
    assert error.value.message.index(was) < error.value.message.index(now)


def test_write_run_folder_one_dataset_leaves_the_record_that_it_always_left(run, record):
    written = json.loads((run.run_dir / "data.json").read_text())
    assert list(written) == ["tokenizer", "rule", "fingerprint"]
    assert written["tokenizer"] == record.tokenizer.model_dump()


def test_write_run_folder_blend_is_read_back(run, record, tmp_path):
    write_run_folder(run, _blend(record, *BLEND), load_tokenizer(tmp_path / "dataset" / "tokenizer"))
    assert read_data_record(run.run_dir) == _blend(record, *BLEND)


def test_write_run_folder_interrupted_keeps_the_old_content(run, record, tmp_path, monkeypatch):
    before = [(run.run_dir / name).read_bytes() for name in ("config.yaml", "data.json")]
    changed = load_run_config(None, [f"run_dir={run.run_dir}", "train.steps=600000"])

    def die(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(run.run_dir), "replace", die)
    with pytest.raises(OSError, match="disk full"):
        write_run_folder(changed, _blend(record, *BLEND), load_tokenizer(tmp_path / "dataset" / "tokenizer"))
    assert [(run.run_dir / name).read_bytes() for name in ("config.yaml", "data.json")] == before


def test_read_record_damaged_file_is_named(run):
    (run.run_dir / "data.json").write_text("{")
    with raises(CheckpointError, "JSON", location=run.run_dir / "data.json"):
        read_data_record(run.run_dir)


def test_page_of_checkpoints_lists_what_a_run_may_change_freely():
    page = (ROOT / "docs/checkpoints.md").read_text()
    section = page.partition("## What a run may change")[2].partition("\n## ")[0]
    intervals_and_paths = {key for key in _FREE if key.endswith("_every")} | {"run_dir", "data.path"}
    for key in _FREE - intervals_and_paths - {"data.segments"}:  # the rule that the data records is compared
        assert f"`{key}`" in section or f"`{key}:`" in section or f"`{key}: null`" in section, key
