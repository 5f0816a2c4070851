"""Checkpoints appear completely or not at all, whenever the process dies; only old ones are removed."""

import shutil
from collections import namedtuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bipe.checkpoint import commit as module
from megatron_bipe.checkpoint.commit import begin, publish, retire, superseded, tidy
from megatron_bipe.checkpoint.find import find_checkpoint, list_steps, step_folder
from megatron_bipe.config import CheckpointConfig
from megatron_bipe.data.manifest import FileRecord
from megatron_bipe.errors import CheckpointError
from tests.helpers.errors import raises

RANK_FILE = "rank-00000.safetensors"


def write(run_dir, step, text="x"):
    folder = begin(run_dir, step, "token", 0)
    (folder / RANK_FILE).write_text(text)
    return folder, {RANK_FILE: FileRecord(bytes=len(text), sha256="0" * 64)}


def save(run_dir, step, text="x"):
    folder, files = write(run_dir, step, text)
    return publish(folder, run_dir, step, files)


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_publish_makes_it_the_newest_and_leaves_nothing_else(tmp_path):
    for step in (10, 20):
        assert save(tmp_path, step) == step_folder(tmp_path, step)
    assert find_checkpoint(tmp_path).step == 20
    assert names(tmp_path) == ["latest", "step-00000010", "step-00000020"]


def test_begin_makes_no_checkpoint_and_removes_an_earlier_attempt(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "checkpoints" / "writing-step-00000020-dead").mkdir()
    write(tmp_path, 20)
    assert find_checkpoint(tmp_path).step == 10
    assert names(tmp_path) == ["latest", "step-00000010", "writing-step-00000020-token"]


def test_publish_of_a_file_cut_short_is_an_error_and_no_checkpoint(tmp_path):
    folder, files = write(tmp_path, 10, "four")
    (folder / RANK_FILE).write_text("fou")
    with raises(CheckpointError, RANK_FILE, "3 bytes", 4, location=folder):
        publish(folder, tmp_path, 10, files)
    assert list_steps(tmp_path) == []


def test_begin_without_room_is_an_error_that_says_how_much(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 3 * 2**30))
    begin(tmp_path, 10, "token", 3 * 2**30)
    observed = "3.00", "3.50", "checkpoint.min_free_gib"
    with raises(CheckpointError, *observed, location=tmp_path / "checkpoints", remedy="checkpoint.keep_last"):
        begin(tmp_path, 20, "token", 7 * 2**29)
    assert names(tmp_path) == []


def test_publish_of_the_same_step_again_replaces_the_checkpoint(tmp_path):
    save(tmp_path, 10, "old")
    folder = save(tmp_path, 10, "new")
    assert (folder / RANK_FILE).read_text() == "new"
    retire(tmp_path, 10, CheckpointConfig())
    assert names(tmp_path) == ["latest", "step-00000010"]


class Death(BaseException):
    """End of the process."""


@pytest.mark.parametrize("same_step", [False, True])
def test_publish_killed_at_any_step_leaves_a_complete_checkpoint(tmp_path, monkeypatch, same_step):
    """The process dies at every rename and every sync."""
    step, seen = 10 if same_step else 20, set()
    for moment in range(50):
        run_dir = tmp_path / str(moment)
        save(run_dir, 10, "old")
        folder, files = write(run_dir, step, "new")
        count = 0

        def maybe_die(real, moment=moment):
            def call(*args):
                nonlocal count
                count += 1
                if count > moment:
                    raise Death
                return real(*args)

            return call

        with monkeypatch.context() as patch:
            for kind, name in ((module.Path, "rename"), (module.Path, "replace"), (module, "fsync_path")):
                patch.setattr(kind, name, maybe_die(getattr(kind, name)))
            try:
                publish(folder, run_dir, step, files)
            except Death:
                pass
            else:
                assert moment >= 4  # the process died before
                break
        tidy(run_dir)
        found = find_checkpoint(run_dir)
        seen.add((found.folder / RANK_FILE).read_text())
        assert not [name for name in names(run_dir) if name.startswith(("writing", "removing", "replaced"))]
        assert list_steps(run_dir) in ([10], sorted({10, step}))
        save(run_dir, step, "again")
        assert find_checkpoint(run_dir).step == step
    assert seen == ({"old", "new"} if same_step else {"old"})  # the pointer moves last


steps = st.lists(st.integers(1, 60), unique=True, min_size=1, max_size=12)


@given(steps=steps, choice=st.data(), keep_last=st.integers(0, 5), keep_every=st.integers(0, 10))
def test_superseded_keeps_the_newest_the_last_and_the_multiples(steps, choice, keep_last, keep_every):
    newest = choice.draw(st.sampled_from(steps))
    gone = superseded(steps, newest, CheckpointConfig(keep_last=keep_last, keep_every=keep_every))
    assert set(gone) <= {step for step in steps if step < newest}
    kept = [step for step in steps if step <= newest and step not in gone]
    if keep_last == 0:
        assert gone == []
        return
    own = sorted(step for step in steps if step <= newest)
    assert set(own[-keep_last:]) <= set(kept)
    assert all(keep_every and step % keep_every == 0 for step in kept if step not in own[-keep_last:])


def test_retire_after_a_rollback_keeps_later_checkpoints(tmp_path):
    """Steps 20 and 30 were damaged and the run rolled back to 10: its new checkpoints must not be removed for them."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15)
    retire(tmp_path, 15, CheckpointConfig(keep_last=1))
    assert list_steps(tmp_path) == [15, 20, 30]
    assert find_checkpoint(tmp_path).step == 15


def test_retire_cut_short_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    for step in (10, 20):
        save(tmp_path, step)
    monkeypatch.setattr(module, "delete", lambda folder: None)  # it dies before the first file
    retire(tmp_path, 20, CheckpointConfig(keep_last=1))
    assert list_steps(tmp_path) == [20]
    monkeypatch.undo()
    tidy(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000020"]


def test_retire_and_tidy_delete_no_file_that_a_checkpoint_does_not_have(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    folder = tmp_path / "checkpoints"
    kept = [
        folder / name
        for name in (
            "writing-notes/rank-00000.safetensors",
            "removing-step-1/notes.md",
            "replaced-by-hand/notes.md",
            "writing-step-00000030-token/notes.md",
            "step-00000010/results.json",
        )
    ]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    retire(tmp_path, 20, CheckpointConfig(keep_last=1))
    tidy(tmp_path)
    assert list_steps(tmp_path) == [20]
    kept[-1] = folder / "removing-step-00000010/results.json"
    assert {path for path in folder.rglob("*.*") if path.parent.name != "step-00000020"} == set(kept)
