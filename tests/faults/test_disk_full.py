"""The disk fills up while a checkpoint is written: training continues, and the previous checkpoint stays valid.

A tmpfs of a few megabytes is filled to ten random distances from the end of a save. The check of free space that comes
before is made to see more than there is, as where another program takes it meanwhile.
"""

import random
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_bipe.checkpoint.find import list_steps, step_folder
from megatron_bipe.errors import CheckpointError
from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.layouts import Layout, run_config, start_engine_of, train_steps
from tests.helpers.logs import RecordedLog
from tests.helpers.ranks import run_ranks

POINTS, DISK_BYTES, PAGE_BYTES = 10, 8 << 20, 4096


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(reason=f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def engine_on(mesh: Mesh, run_dir: Path, asynchronous: bool) -> tuple[Any, Mesh]:
    from megatron_bipe.config import CheckpointConfig

    run = run_config(Layout(zero=1), run_dir)
    checkpoint = CheckpointConfig(asynchronous=asynchronous, min_free_gib=0, max_failures=0)
    return start_engine_of(run.model_copy(update={"checkpoint": checkpoint}), mesh, 1)


def fill_up(folder: Path, left_bytes: int) -> None:
    """Fill the disk except for this number of bytes, rounded to pages."""
    (folder / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(folder).free - left_bytes)))


def full_disks(mesh: Mesh, disk: str) -> dict[str, Any]:
    import torch.distributed as dist

    heard = RecordedLog()
    folder = Path(disk)
    results: dict[str, Any] = {}
    for asynchronous in (False, True):
        run_dir = folder / str(asynchronous)
        engine, mesh_here = engine_on(mesh, run_dir, asynchronous)
        train_steps(engine, mesh_here, range(1))
        engine.save(run_dir, 1)
        size = sum(path.stat().st_size for path in step_folder(run_dir, 1).iterdir())
        points = [int(size * (point + random.Random(point).random()) / POINTS) for point in range(POINTS)]
        points[-1] = size - 2 * PAGE_BYTES  # only the index does not fit
        outcomes = []
        for number, left in enumerate(points):
            step = 2 + number
            heard.lines.clear()
            dist.barrier()
            if mesh.is_main:
                fill_up(folder, left)
            dist.barrier()
            with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=1 << 40)):
                engine.save(run_dir, step, final=False)
                losses, _ = train_steps(engine, mesh_here, range(step, step + 1))
                found = engine.latest_valid_checkpoint(run_dir)
            outcomes.append((found.step, list_steps(run_dir), len(losses), heard.lines[:]))
            dist.barrier()
            (folder / "ballast").unlink(missing_ok=True)
        dist.barrier()
        if mesh.is_main:
            fill_up(folder, size // 2)
        dist.barrier()
        heard.lines.clear()
        engine.save(run_dir, 50, final=False)  # detected before the save starts
        engine.latest_valid_checkpoint(run_dir)
        results["no room", asynchronous] = heard.lines[:]
        with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=1 << 40)):
            try:
                engine.save(run_dir, 50)
                last = "it was saved"
            except CheckpointError as error:
                last = str(error)
        dist.barrier()
        (folder / "ballast").unlink(missing_ok=True)
        dist.barrier()
        left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        engine.save(run_dir, 60)
        results[asynchronous] = (outcomes, last, left, engine.latest_valid_checkpoint(run_dir).step)
        dist.barrier()
        if mesh.is_main:
            shutil.rmtree(run_dir)
    return results


@pytest.fixture(scope="module")
def ranks(small_disk, tmp_path_factory):
    return run_ranks(full_disks, 2, tmp_path_factory.mktemp("full"), disk=str(small_disk))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_disk_full_at_any_point_of_a_save_training_continues_and_the_last_checkpoint_loads(ranks, asynchronous):
    for rank, results in enumerate(ranks):
        outcomes, *_ = results[asynchronous]
        assert len(outcomes) == POINTS
        for step, steps, num_losses, lines in outcomes:
            assert (step, steps, num_losses) == (1, [1], 1)
            warnings = [line for line in lines if "no checkpoint" in line]
            assert len(warnings) == (rank == 0)
            for line in warnings:
                assert "No space left on device" in line and "checkpoint.keep_last" in line


@pytest.mark.parametrize("asynchronous", [False, True])
def test_disk_full_at_the_last_save_is_an_error_on_all_ranks_and_leaves_nothing(ranks, asynchronous):
    for results in ranks:
        _, last, left, saved = results[asynchronous]
        assert "No space left on device" in last and "Free space there" in last
        assert left == ["latest", "step-00000001"]
        assert saved == 60


@pytest.mark.parametrize("asynchronous", [False, True])
def test_disk_too_small_for_a_save_is_detected_before_it_starts(ranks, asynchronous):
    [line] = ranks[0]["no room", asynchronous]
    assert "step 50 | no checkpoint:" in line and "GiB of the disk are free" in line
