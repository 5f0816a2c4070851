"""All ranks detect any damage of any file of a checkpoint, and fall back to the previous checkpoint."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_bipe.checkpoint.find import step_folder
from megatron_bipe.checkpoint.manifest import CHECKSUM_NAME, INDEX
from megatron_bipe.checkpoint.shard_files import rank_file
from megatron_bipe.errors import CheckpointError
from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.layouts import Layout, start, train_steps
from tests.helpers.logs import RecordedLog
from tests.helpers.ranks import run_ranks

OLD, NEW = 10, 20
FILES = (rank_file(0), rank_file(1), INDEX, CHECKSUM_NAME)


def flipped(at):
    def damage(path, other):
        content = bytearray(path.read_bytes())
        content[int(at * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


DAMAGES = {
    "cut to half": lambda path, other: os.truncate(path, path.stat().st_size // 2),
    "cut by a byte": lambda path, other: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path, other: os.truncate(path, 0),
    "longer by a byte": lambda path, other: path.open("ab").write(b"\n"),
    "first bit flipped": flipped(0.0),
    "a bit in the middle flipped": flipped(0.5),
    "last bit flipped": flipped(1.0),
    "deleted": lambda path, other: path.unlink(),
    "of another run": lambda path, other: shutil.copyfile(other, path),
    "a folder": lambda path, other: (path.unlink(), path.mkdir()),
}
POINTER = ("cut to half", "emptied", "last bit flipped", "deleted", "first bit flipped", "a folder")
CASES = [(file, damage) for file in FILES for damage in DAMAGES]


def choose(engine: Any, run_dir: Path, heard: RecordedLog) -> tuple[Any, list[str]]:
    """Return the chosen step or the error, and the warnings."""
    heard.lines.clear()
    try:
        step = engine.latest_valid_checkpoint(run_dir).step
    except CheckpointError as error:
        return str(error), heard.lines[:]
    return step, heard.lines[:]


def damage_all(mesh: Mesh, work_dir: str) -> dict[str, Any]:
    """Load every case from a copy of the run folder, in the processes of one launch."""
    import torch.distributed as dist

    heard = RecordedLog(logging.WARNING)
    run_dir, other = Path(work_dir) / "run", Path(work_dir) / "other"
    engine, mesh_here = start(Layout(zero=1), mesh, run_dir)
    train_steps(engine, mesh_here, range(2))
    engine.save(run_dir, OLD)
    expected = train_steps(engine, mesh_here, range(2, 4))
    engine.save(run_dir, NEW)
    train_steps(engine, mesh_here, range(4, 5))
    engine.save(other, NEW)  # the same sizes, other numbers

    def in_copied_run(change: Any) -> tuple[Any, list[str]]:
        copy = Path(work_dir) / "copy"
        if mesh.is_main:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(run_dir, copy)
            change(copy)
        dist.barrier()
        return choose(engine, copy, heard)

    def hurt_pointer(damage: str) -> Any:
        return lambda copy: DAMAGES[damage](copy / "checkpoints" / "latest", None)

    def hurt_both(copy: Path) -> None:
        for step in (OLD, NEW):
            flipped(0.3)(step_folder(copy, step) / rank_file(1), None)

    found = {
        (file, damage): in_copied_run(
            lambda copy, file=file, damage=damage: DAMAGES[damage](
                step_folder(copy, NEW) / file, step_folder(other, NEW) / file
            )
        )
        for file, damage in CASES
    }
    results = {
        "found": found,
        "pointer": [in_copied_run(hurt_pointer(damage)) for damage in POINTER],
        "intact": in_copied_run(lambda copy: None),
        "none": in_copied_run(hurt_both),
        "moved": in_copied_run(lambda copy: step_folder(copy, OLD).rename(step_folder(copy, 30))),
        "empty": engine.latest_valid_checkpoint(Path(work_dir) / "nothing"),
    }
    engine.load(engine.latest_valid_checkpoint(run_dir).folder.with_name(step_folder(run_dir, OLD).name))
    results["resumed"] = train_steps(engine, mesh_here, range(2, 4)) == expected
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    return run_ranks(damage_all, 2, folder, work_dir=str(folder))


@pytest.mark.parametrize(("file", "damage"), CASES)
def test_damage_of_any_file_is_detected_by_all_ranks_and_the_previous_checkpoint_is_loaded(ranks, file, damage):
    steps = [rank["found"][file, damage][0] for rank in ranks]
    assert steps == [OLD, OLD]
    warnings, others = (rank["found"][file, damage][1] for rank in ranks)
    assert others == []
    [line] = warnings
    assert line.startswith(f"falling back to the checkpoint of step {OLD}: that of step {NEW}:")
    named = file if file not in (INDEX, CHECKSUM_NAME) else INDEX
    assert named in line


def test_damage_of_the_pointer_loses_nothing(ranks):
    for rank in ranks:
        assert [step for step, _ in rank["pointer"]] == [NEW] * len(POINTER)


def test_intact_checkpoint_is_loaded_without_a_warning(ranks):
    for rank in ranks:
        assert rank["intact"] == (NEW, [])
        assert rank["resumed"]
        assert rank["empty"] is None


def test_damage_of_all_checkpoints_is_an_error_on_all_ranks_that_names_each(ranks):
    for rank in ranks:
        error, _ = rank["none"]
        assert f"that of step {OLD}" in error and f"that of step {NEW}" in error and rank_file(1) in error
        assert "run_dir=OTHER" in error


def test_checkpoint_under_the_name_of_another_step_is_not_loaded(ranks):
    for rank in ranks:
        assert rank["moved"] == (NEW, [])
