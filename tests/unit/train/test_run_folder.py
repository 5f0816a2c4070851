"""A run folder is started once, continued, and never mixed with another run."""

import json

import pytest

from megatron_bipe.config.load import load_run_config
from megatron_bipe.data.manifest import BlendMember, DataRecord, TokenizerRecord
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
    changed = load_run_config(None, [f"run_dir={run.run_dir}", "train.micro_batch=4", "parallel.tensor=4"])
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


def _blend(record, *members):
    blend = [BlendMember(path=path, fingerprint=letter * 64, slots=slots) for path, letter, slots in members]
    return record.model_copy(update={"fingerprint": members[0][1] * 64, "blend": tuple(blend)})


BLEND = ("data/x", "1", 3000), ("data/y", "2", 7000)


def _continue(run, old, new, path="{data/x: 3, data/y: 7}"):
    _checkpoint(run, 10)
    (run.run_dir / "data.json").write_text(old.model_dump_json(exclude_defaults=True))
    return resume_point(load_run_config(None, [f"run_dir={run.run_dir}", f"data.path={path}"]), new)


@pytest.mark.parametrize("path", ["{data/x: 3, data/y: 7}", "{moved/x: 30, moved/y: 70}", "[moved/x, moved/y]"])
def test_resume_point_same_blend_wherever_it_lies_is_continued(run, record, path):
    moved = _blend(record, *((folder.replace("data", "moved"), letter, slots) for folder, letter, slots in BLEND))
    assert _continue(run, _blend(record, *BLEND), moved, path).step == 10


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([BLEND[0], ("new/y", "3", 7000)], "dataset 2 of the blend was data/y (222222222222) and is now new/y (3333"),
        (
            [("data/x", "1", 3001), ("data/y", "2", 6999)],
            "dataset 1 of the blend, data/x, was 30.00% and is now 30.01%",
        ),
        ([BLEND[1], BLEND[0]], "dataset 1 of the blend was data/x (111111111111) and is now data/y"),
        ([*BLEND, ("data/z", "3", 1)], "was a blend of 2 datasets and is now a blend of 3 datasets"),
    ],
)
def test_resume_point_changed_blend_names_the_member(run, record, members, message):
    with pytest.raises(CheckpointError) as error:
        _continue(run, _blend(record, *BLEND), _blend(record, *members))
    assert message in str(error.value)


@pytest.mark.parametrize("back", [False, True])
def test_resume_point_one_dataset_become_a_blend_or_back_is_refused(run, record, back):
    old, new = (_blend(record, *BLEND), record) if back else (record, _blend(record, *BLEND))
    sizes = ["one dataset", "a blend of 2 datasets"]
    was, now = reversed(sizes) if back else sizes
    with pytest.raises(CheckpointError, match=f"training data was {was} and is now {now}"):
        _continue(run, old, new)


def test_write_run_folder_one_dataset_leaves_the_record_that_it_always_left(run, record):
    written = json.loads((run.run_dir / "data.json").read_text())
    assert list(written) == ["tokenizer", "rule", "fingerprint"]
    assert written["tokenizer"] == record.tokenizer.model_dump()


def test_write_run_folder_blend_is_read_back(run, record, tmp_path):
    write_run_folder(run, _blend(record, *BLEND), load_tokenizer(tmp_path / "dataset" / "tokenizer"))
    assert read_record(run.run_dir) == _blend(record, *BLEND)


def test_read_record_damaged_file_is_named(run):
    (run.run_dir / "data.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_record(run.run_dir)
