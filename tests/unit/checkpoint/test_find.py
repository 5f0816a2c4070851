"""Lookup of checkpoints by name, and the order in which they are tried."""

import pytest

from megatron_bipe.checkpoint.find import find_checkpoint, is_run_dir, list_steps, newest_first, step_folder
from megatron_bipe.errors import CheckpointError
from tests.helpers.errors import raises


def make(run_dir, *steps, pointer=None):
    for step in steps:
        step_folder(run_dir, step).mkdir(parents=True)
    if pointer is not None:
        (run_dir / "checkpoints" / "latest").write_text(pointer)


def test_find_newest_and_by_step(tmp_path):
    make(tmp_path, 10, 20, pointer="step-00000020\n")
    assert find_checkpoint(tmp_path) == (step_folder(tmp_path, 20), tmp_path, 20)
    assert find_checkpoint(f"{tmp_path}@10").step == 10
    assert list_steps(tmp_path) == [10, 20]


def test_find_checkpoint_folder_names_may_hold_an_at_sign(tmp_path):
    make(tmp_path / "lr@3e-4", 10)
    assert find_checkpoint(tmp_path / "lr@3e-4").step == 10
    assert find_checkpoint(f"{tmp_path}/lr@3e-4@10").run_dir == tmp_path / "lr@3e-4"


@pytest.mark.parametrize("pointer", [None, "step-00000030\n", "nonsense", ""])
def test_newest_first_with_a_missing_or_wrong_pointer_starts_with_the_last(tmp_path, pointer):
    make(tmp_path, 10, 20, pointer=pointer)
    assert [checkpoint.step for checkpoint in newest_first(tmp_path)] == [20, 10]
    assert find_checkpoint(tmp_path).step == 20


def test_newest_first_ignores_a_pointer_that_is_not_text(tmp_path):
    make(tmp_path, 10)
    (tmp_path / "checkpoints" / "latest").write_bytes(b"\xff\xfe")
    assert find_checkpoint(tmp_path).step == 10


def test_newest_first_starts_at_the_pointer_and_continues_with_older_checkpoints(tmp_path):
    make(tmp_path, 10, 20, 30, 40, pointer="step-00000020\n")
    assert [checkpoint.step for checkpoint in newest_first(tmp_path)] == [20, 10, 40, 30]
    assert find_checkpoint(tmp_path).step == 20


def test_list_steps_skips_unfinished_checkpoints_and_those_being_removed(tmp_path):
    make(tmp_path, 10)
    for name in ("writing-step-00000020-ab", "removing-step-00000005", "replaced-step-00000007", "step-1", "other"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert list_steps(tmp_path) == [10]


@pytest.mark.parametrize("spec", ["@30", ""])
def test_find_missing_checkpoint_lists_the_steps(tmp_path, spec):
    folder = tmp_path
    if spec:
        make(tmp_path, 10)
    else:
        folder = tmp_path / "nowhere"
    observed = ["step 30", "10"] if spec else []
    with raises(CheckpointError, *observed, location=f"{folder}{spec}", remedy="RUN_DIR@STEP"):
        find_checkpoint(f"{folder}{spec}")


def test_is_run_dir_needs_configuration_and_checkpoints(tmp_path):
    assert not is_run_dir(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    make(tmp_path, 10)
    assert is_run_dir(tmp_path)
