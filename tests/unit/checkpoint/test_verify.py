"""Checks of a checkpoint before it is read; tests/faults has every kind of damage, on several ranks."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch

from megatron_bipe import io
from megatron_bipe.checkpoint.find import find_checkpoint
from megatron_bipe.checkpoint.manifest import CHECKSUM_NAME, INDEX, load_index
from megatron_bipe.checkpoint.verify import belongs_to_another_run, check_complete, latest_valid_checkpoint
from megatron_bipe.config import RunConfig
from megatron_bipe.config.load import load_run_config
from megatron_bipe.data.manifest import DataRecord, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.errors import CheckpointError
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.host_collectives import HostCollectives
from megatron_bipe.runtime.observer import Observer
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.errors import assert_warned, raises

MESH = Mesh(0, 0, 1, 1, torch.device("cpu"))
TOKENIZER = TokenizerRecord(name="t", fingerprint="a" * 64, vocab_size=100, special_ids={})
RECORD = DataRecord(tokenizer=TOKENIZER, rule=SegmentRule(spec="[5]", token_ids=(5,)), fingerprint="c" * 64)
OTHER_TOKENIZER = TOKENIZER.model_copy(update={"fingerprint": "b" * 64})


@pytest.fixture
def index(tmp_path):
    return load_index(write_checkpoint(tmp_path, 10, {"0.x": torch.ones(3)})).model_copy(update={"data": RECORD})


def test_check_complete_returns_the_index_with_a_record_of_every_file(tmp_path):
    folder = write_checkpoint(tmp_path, 10, {"0.x": torch.ones(3)})
    found = check_complete(find_checkpoint(tmp_path))
    assert {path.name for path in folder.iterdir()} == {*found.files, "state.json", "state.json.sha256"}
    assert RunConfig.model_validate(found.config) == load_run_config(None)


def test_check_complete_parts_cover_all_files(tmp_path):
    write_checkpoint(tmp_path, 10, {"0.x": torch.ones(3)})
    checkpoint = find_checkpoint(tmp_path)
    (checkpoint.folder / "rank-00000.safetensors").write_bytes(b"x")
    outcomes = []
    for part in range(3):
        try:
            check_complete(checkpoint, part, 3)
            outcomes.append("good")
        except CheckpointError as error:
            outcomes.append(error.message)
    assert outcomes[1:] == ["good", "good"] and "rank-00000.safetensors has 1 bytes" in outcomes[0]


@pytest.mark.parametrize(
    ("settings", "data", "expected"),
    [
        (["train.steps=7", "optimizer.lr=1e-3", "parallel.tensor=2"], RECORD, ""),
        ([], None, ""),
        ([], RECORD.model_copy(update={"fingerprint": "d" * 64}), ""),  # `--allow data`
        (["model.num_layers=2"], RECORD, "another model"),
        (["train.seed=7"], RECORD, "train.seed=1234"),
        ([], RECORD.model_copy(update={"tokenizer": OTHER_TOKENIZER}), "another tokenizer"),
        ([], RECORD.model_copy(update={"rule": SegmentRule(spec="[6]", token_ids=(6,))}), r"segment rule [5]"),
    ],
)
def test_of_another_run_names_what_no_run_can_change(index, settings, data, expected):
    found = belongs_to_another_run(index, load_run_config(None, settings), data)
    assert found == "" if not expected else expected in found


def test_of_another_run_reads_the_configuration_of_another_version(index):
    index = index.model_copy(update={"config": {"model": {"unknown": 1}}})
    assert "cannot be read" in belongs_to_another_run(index, load_run_config(None), None)


class Recorder(Observer):
    """Observer that keeps what it receives."""

    def __init__(self):
        self.num_signs, self.fell = 0, []

    def progress(self):
        self.num_signs += 1

    def fell_back(self, to_step, skipped):
        self.fell.append((to_step, dict(skipped)))


def _choose(tmp_path, recorder=None):
    return latest_valid_checkpoint(tmp_path, lambda index: "", MESH, HostCollectives(MESH), recorder)


def _fail_to_read(monkeypatch, times, number=errno.EIO, step=20):
    """Let the first reads of a file of this step fail."""
    real, left = Path.open, [times]

    def opened(path, *args, **options):
        if path.name == "rank-00000.safetensors" and path.parent.name == f"step-{step:08d}" and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(io, "READ_PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_latest_valid_checkpoint_is_read_again_after_an_error_that_passes(tmp_path, monkeypatch, caplog, number):
    for step in (10, 20):
        write_checkpoint(tmp_path, step, {"0.x": torch.ones(3)})
    _fail_to_read(monkeypatch, 2, number)
    recorder = Recorder()
    assert _choose(tmp_path, recorder).step == 20
    assert recorder.fell == [] and recorder.num_signs > 0
    assert_warned(caplog, os.strerror(number), "rank-00000.safetensors")


def test_latest_valid_checkpoint_that_stays_unreadable_is_skipped_on_record(tmp_path, monkeypatch):
    for step in (10, 20):
        write_checkpoint(tmp_path, step, {"0.x": torch.ones(3)})
    _fail_to_read(monkeypatch, 3)
    recorder = Recorder()
    assert _choose(tmp_path, recorder).step == 10
    [(to_step, skipped)] = recorder.fell
    assert to_step == 10 and list(skipped) == [20] and "cannot be read: Input/output error" in skipped[20]


@pytest.mark.parametrize(("number", "transient"), [(errno.EIO, True), (errno.EACCES, False)])
def test_no_readable_checkpoint_is_an_error_that_may_pass_if_the_disk_failed(tmp_path, monkeypatch, number, transient):
    write_checkpoint(tmp_path, 20, {"0.x": torch.ones(3)})
    _fail_to_read(monkeypatch, 3, number)
    with raises(CheckpointError, 20, location=tmp_path) as caught:
        _choose(tmp_path)
    assert caught.value.transient == transient


def test_latest_valid_checkpoint_skips_those_of_another_run(tmp_path):
    for step in (10, 20):
        write_checkpoint(tmp_path, step, {"0.x": torch.ones(3)})
    assert (
        latest_valid_checkpoint(
            tmp_path, lambda index: "foreign" if index.step == 20 else "", MESH, HostCollectives(MESH)
        ).step
        == 10
    )
    with raises(CheckpointError, "step 20", "step 10", "foreign", location=tmp_path, remedy="run_dir"):
        latest_valid_checkpoint(tmp_path, lambda index: "foreign", MESH, HostCollectives(MESH))


@pytest.mark.parametrize("name", ["../rank-00000.safetensors", "/rank-00000.safetensors", "rank-00001.safetensors"])
def test_index_that_names_a_file_outside_or_without_a_checksum_is_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path, 10, {"0.x": torch.ones(3)})
    text = (folder / INDEX).read_bytes().replace(b'"file": "rank-00000.safetensors"', f'"file": "{name}"'.encode())
    assert name.encode() in text
    (folder / INDEX).write_bytes(text)
    (folder / CHECKSUM_NAME).write_text(f"{hashlib.sha256(text).hexdigest()}  {INDEX}\n")
    with raises(CheckpointError, name, location=folder):
        check_complete(find_checkpoint(tmp_path))
