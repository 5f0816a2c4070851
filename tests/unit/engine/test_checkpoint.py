"""Checkpoints appear whole or not at all, and are found by name."""

import pytest

from megatron_bipe.engine.checkpoint import find_checkpoint, is_run_dir, list_steps, publish, step_folder
from megatron_bipe.errors import CheckpointError


def _write(text):
    def write(folder):
        (folder / "state.pt").write_text(text)

    return write


def _publish(run_dir, step, write, finish=lambda folder: None, is_main=True, barrier=lambda: None):
    return publish(run_dir, step, write, finish, is_main, barrier)


def test_publish_then_find_newest_and_by_step(tmp_path):
    for step in (10, 20):
        _publish(tmp_path, step, _write(str(step)))
    assert find_checkpoint(tmp_path) == (step_folder(tmp_path, 20), tmp_path, 20)
    assert find_checkpoint(f"{tmp_path}@10").step == 10
    assert list_steps(tmp_path) == [10, 20]


def test_find_checkpoint_folder_names_may_hold_an_at_sign(tmp_path):
    _publish(tmp_path / "lr@3e-4", 10, _write(""))
    assert find_checkpoint(tmp_path / "lr@3e-4").step == 10
    assert find_checkpoint(f"{tmp_path}/lr@3e-4@10").run_dir == tmp_path / "lr@3e-4"


@pytest.mark.parametrize("pointer", [None, "step-00000030\n", "nonsense"])
def test_find_checkpoint_pointer_missing_or_wrong_takes_the_newest(tmp_path, pointer):
    for step in (10, 20):
        _publish(tmp_path, step, _write(""))
    path = tmp_path / "checkpoints" / "latest"
    path.unlink() if pointer is None else path.write_text(pointer)
    assert find_checkpoint(tmp_path).step == 20


def test_find_checkpoint_follows_the_pointer_back(tmp_path):
    for step in (10, 20):
        _publish(tmp_path, step, _write(""))
    (tmp_path / "checkpoints" / "latest").write_text("step-00000010\n")
    assert find_checkpoint(tmp_path).step == 10


def test_publish_same_step_again_replaces_it(tmp_path):
    _publish(tmp_path, 10, _write("old"))
    _publish(tmp_path, 10, _write("new"))
    assert (find_checkpoint(tmp_path).folder / "state.pt").read_text() == "new"


def test_publish_waits_for_all_ranks_before_and_after_the_rename(tmp_path):
    seen = []
    _publish(
        tmp_path,
        10,
        lambda folder: seen.append("write"),
        lambda folder: seen.append("finish"),
        barrier=lambda: seen.append(step_folder(tmp_path, 10).exists()),
    )
    assert seen == [False, "write", False, "finish", True]


def test_publish_other_ranks_leave_the_renaming_to_the_main_one(tmp_path):
    _publish(tmp_path, 10, lambda folder: None, finish=_write(""), is_main=False)
    assert not (tmp_path / "checkpoints").exists()


def test_publish_after_a_broken_attempt_keeps_nothing_of_it(tmp_path):
    def break_off(folder):
        (folder / "of a rank that is no more").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _publish(tmp_path, 10, break_off)
    folder = _publish(tmp_path, 10, _write("whole"))
    assert [path.name for path in folder.iterdir()] == ["state.pt"]


def test_publish_failing_write_leaves_the_previous_checkpoint(tmp_path):
    _publish(tmp_path, 10, _write("good"))

    def break_off(folder):
        _write("half")(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _publish(tmp_path, 20, break_off)
    assert find_checkpoint(tmp_path).step == 10
    assert list_steps(tmp_path) == [10]


@pytest.mark.parametrize("spec", ["@30", ""])
def test_find_missing_checkpoint_lists_the_steps(tmp_path, spec):
    folder = tmp_path
    if spec:
        _publish(tmp_path, 10, _write(""))
    else:
        folder = tmp_path / "nowhere"
    with pytest.raises(CheckpointError, match="steps there are: 10" if spec else "steps there are: none"):
        find_checkpoint(f"{folder}{spec}")


def test_is_run_dir_needs_configuration_and_checkpoints(tmp_path):
    assert not is_run_dir(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    _publish(tmp_path, 10, _write(""))
    assert is_run_dir(tmp_path)
