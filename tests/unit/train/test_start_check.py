"""A dry run finds what would end the run at its start, and a start warns of what it finds suspicious."""

from types import SimpleNamespace

import pytest
import torch

from megatron_bipe.checkpoint.commit import begin as begin_folder
from megatron_bipe.checkpoint.commit import publish
from megatron_bipe.checkpoint.find import step_folder
from megatron_bipe.checkpoint.manifest import CheckpointInfo
from megatron_bipe.checkpoint.shard_files import write_index
from megatron_bipe.config.load import load_run_config
from megatron_bipe.data.dataset import open_tokenizer
from megatron_bipe.errors import CheckpointError, ConfigError, DataError
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.train.batch_loader import BatchLoader
from megatron_bipe.train.run_folder import write_run_folder
from megatron_bipe.train.start_check import check_start, start_warnings
from tests.helpers.errors import raises

MESH = Mesh(0, 0, 1, 1, torch.device("cpu"))


@pytest.fixture
def make(tmp_path, write_text_dataset):
    for name in ("data", "valid"):
        write_text_dataset(tmp_path / name, [["a b c d e f g h"] * 40])

    def configured(*settings):
        base = [
            f"run_dir={tmp_path / 'run'}",
            f"data.path={tmp_path / 'data'}",
            f"data.valid_path={tmp_path / 'valid'}",
        ]
        small = ["train.seq_len_tokens=8", "train.precision=fp32", "train.steps=20", "optimizer.warmup_steps=0"]
        return load_run_config(None, [*base, *small, "train.global_batch=8", *settings])

    return configured


def begin(run, step):
    loader = BatchLoader(run, MESH)
    write_run_folder(run, loader.record, open_tokenizer(loader.dataset))
    step_folder(run.run_dir, step).mkdir(parents=True)


def test_check_start_of_a_run_that_can_start_and_resume_is_silent(make):
    check_start(make(), MESH)
    begin(make(), 10)
    check_start(make("checkpoint.keep_last=2"), MESH)
    assert start_warnings(make()) == []


@pytest.mark.parametrize(
    ("settings", "kind", "observed"),
    [
        (["data.path=ABSENT"], DataError, []),
        (["data.valid_path=ABSENT"], DataError, []),
        (["data.valid_path=null", "data.valid={a: ABSENT, b: MISSING}"], ConfigError, ["ABSENT", "MISSING"]),
        (["train.valid_lengths=[8, 100000]"], DataError, [100_000]),
        (["train.seq_len_tokens=100000", "model.intra_size=100000"], DataError, [100_000]),
        (["model.vocab_size=8"], ConfigError, ["model.vocab_size=8"]),
        (["data.segments=fixed:3"], ConfigError, ["fixed:3"]),
        (["train.init_from=ABSENT"], CheckpointError, []),
        (["run_dir=FILE/run"], ConfigError, ["FILE", "folder"]),
    ],
)
def test_check_start_names_what_would_end_the_run(make, tmp_path, monkeypatch, settings, kind, observed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    with raises(kind, *observed):
        check_start(make(*settings), MESH)


def test_check_start_on_a_full_disk_is_refused(make, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with raises(ConfigError, tmp_path, "full", location=tmp_path / "run"):
        check_start(make(), MESH)


def test_check_start_folder_of_another_run_is_refused_also_without_data(make):
    begin(make(), 10)
    changed = make("model.num_layers=2", "optimizer.lr=1")
    with raises(CheckpointError, "model.num_layers", "optimizer.lr", location=changed.run_dir):
        check_start(changed, MESH, ["data"])
    check_start(make("optimizer.lr=1"), MESH, ["optimizer"])
    both = make("model.num_layers=2", "data.path=ABSENT", "train.init_from=ABSENT")
    with raises(ConfigError, 2, "ABSENT", "model.num_layers", location="--dry-run"):
        check_start(both, MESH)


def test_start_warnings_tell_of_steps_without_a_learning_rate(make):
    [warning] = start_warnings(make("optimizer.decay_steps=12"))
    assert "12" in warning and "8 steps" in warning and "optimizer.min_lr" in warning
    for settings in (["optimizer.min_lr=1e-6"], ["optimizer.decay=constant"], ["train.steps=12"]):
        assert start_warnings(make("optimizer.decay_steps=12", *settings)) == []


def test_start_warnings_tell_of_another_validation_in_a_resumed_run(make, tmp_path):
    changed = make("train.valid_samples=64", f"data.valid_path={tmp_path / 'data'}")
    assert start_warnings(changed) == []
    begin(make(), 10)
    path, samples = start_warnings(changed)
    assert str(tmp_path / "valid") in path and str(tmp_path / "data") in path and "512" in samples and "64" in samples
    same = make("data.valid_path=null", f"data.valid={{valid: {tmp_path / 'valid'}}}", "train.valid_lengths=[8]")
    assert start_warnings(same) == []
    [lengths] = start_warnings(make("train.valid_lengths=[8, 16]"))
    assert "train.valid_lengths" in lengths and "[8]" in lengths and "[8, 16]" in lengths
    assert start_warnings(make("data.valid_path=null")) != []


def test_start_warnings_tell_of_another_validation_than_that_of_the_trunk(make, tmp_path):
    trunk = make(f"run_dir={tmp_path / 'trunk'}")
    loader = BatchLoader(trunk, MESH)
    write_run_folder(
        make(f"run_dir={tmp_path / 'trunk'}", "train.valid_samples=16"), loader.record, open_tokenizer(loader.dataset)
    )
    folder = begin_folder(trunk.run_dir, 10, "test", 0)
    config = trunk.model_dump(mode="json")
    write_index(folder, CheckpointInfo(10, 10, {"ranks": 1}, config, loader.record, {}), {})
    publish(folder, trunk.run_dir, 10, {})
    of_trunk = f"train.branch_from={trunk.run_dir}@10"
    assert start_warnings(make(of_trunk)) == []  # the settings of the checkpoint count
    [lengths] = start_warnings(make(of_trunk, "train.valid_lengths=[8, 16]"))
    assert "train.valid_lengths" in lengths and "[8, 16]" in lengths
    begin(make(of_trunk, "train.valid_lengths=[8, 16]"), 12)
    assert start_warnings(make(of_trunk, "train.valid_lengths=[8, 16]")) == []


def test_start_warnings_tell_of_a_disk_that_is_too_small(make):
    [warning] = start_warnings(make("checkpoint.min_free_gib=1e9"))
    assert "checkpoint.keep_last" in warning
