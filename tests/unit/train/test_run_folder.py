"""A run folder is started once, continued, and never mixed with another run."""

import pytest

from megatron_bipe.config.load import load_run_config
from megatron_bipe.data.manifest import DataRecord, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.engine.checkpoint import step_folder
from megatron_bipe.errors import CheckpointError
from megatron_bipe.train.run_folder import read_record, resume_point, write_run_folder


@pytest.fixture
def record():
    tokenizer = TokenizerRecord(name="t", fingerprint="a" * 64, vocab_size=100, special_ids={"bos": 1})
    return DataRecord(tokenizer=tokenizer, rule=SegmentRule(spec="[5]", token_ids=(5,)), fingerprint="c" * 64)


@pytest.fixture
def run(tmp_path, record, write_text_dataset):
    write_text_dataset(tmp_path / "dataset", [["a b"]])
    run = load_run_config(None, [f"run_dir={tmp_path / 'run'}"])
    write_run_folder(run, record, load_tokenizer(tmp_path / "dataset" / "tokenizer"))
    return run


def _checkpoint(run, step):
    step_folder(run.run_dir, step).mkdir(parents=True)
    (run.run_dir / "checkpoints" / "latest").write_text(step_folder(run.run_dir, step).name + "\n")


def test_resume_point_without_a_checkpoint_is_none(run, record):
    assert resume_point(run, record) is None


def test_resume_point_same_run_is_its_newest_checkpoint(run, record):
    _checkpoint(run, 10)
    _checkpoint(run, 20)
    assert resume_point(run, record).step == 20
    assert (run.run_dir / "tokenizer" / "tokenizer.json").is_file()
    assert read_record(run.run_dir) == record


def test_resume_point_harmless_changes_are_allowed(run, record):
    _checkpoint(run, 10)
    changed = load_run_config(None, [f"run_dir={run.run_dir}", "train.micro_batch=4", "train.log_every=1"])
    assert resume_point(changed, record).step == 10


def test_resume_point_another_run_names_every_difference(run, record):
    _checkpoint(run, 10)
    changed = load_run_config(None, [f"run_dir={run.run_dir}", "model.num_layers=2", "optimizer.lr=2e-4"])
    other = record.model_copy(
        update={
            "fingerprint": "d" * 64,
            "rule": SegmentRule(spec="[6]", token_ids=(6,)),
            "tokenizer": record.tokenizer.model_copy(update={"fingerprint": "e" * 64}),
        }
    )
    with pytest.raises(CheckpointError) as error:
        resume_point(changed, other)
    for part in (
        "model.num_layers was 12 and is now 2",
        "optimizer.lr",
        "segment rule was [5]",
        "tokenizer",
        "dataset",
    ):
        assert part in str(error.value)
    assert error.value.place == str(run.run_dir)


def test_read_record_damaged_file_is_named(run):
    (run.run_dir / "data.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_record(run.run_dir)
