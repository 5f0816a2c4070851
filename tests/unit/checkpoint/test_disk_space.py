"""The disk space of a run's checkpoints is known before it starts."""

import shutil
from types import SimpleNamespace

import pytest

from megatron_bipe.checkpoint.commit import superseded
from megatron_bipe.checkpoint.disk_space import plan_disk
from megatron_bipe.checkpoint.find import step_folder
from megatron_bipe.config.load import load_run_config

GB = 10**9
PARAMETERS = GB // 12  # checkpoints of 1 GB


@pytest.fixture
def plan(tmp_path, monkeypatch):
    def make(free, existing, *settings):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free * GB)))
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        for step in existing:
            step_folder(tmp_path / "runs" / "run", step).mkdir(parents=True)
        base = [f"run_dir={tmp_path / 'runs' / 'run'}", "checkpoint.min_free_gib=0"]
        return plan_disk(load_run_config(None, [*base, *settings]), PARAMETERS)

    return make


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (["train.steps=100", "train.save_every=10"], 10),
        (["train.steps=105", "train.save_every=10"], 11),
        (["train.steps=100", "train.save_every=0"], 1),
        (["train.steps=100", "train.save_every=10", "checkpoint.keep_last=3"], 3),
        (["train.steps=100", "train.save_every=10", "checkpoint={keep_last: 3, keep_every: 40}"], 4),
        (["train.steps=5", "train.save_every=10", "checkpoint.keep_last=3"], 1),
    ],
)
@pytest.mark.parametrize("existing", [[], [10], [10, 20, 40]])
def test_plan_disk_counts_what_a_run_keeps(plan, settings, kept, existing):
    found = plan(1000, existing, *settings)
    assert found.num_kept == kept or existing
    run = load_run_config(None, settings)
    run_steps, every, config = run.train.steps, run.train.save_every, run.checkpoint
    disk, most = list(existing), len(existing)
    for step in range(max(existing, default=0) + 1, run_steps + 1):  # what the writer does
        if step == run_steps or (every and step % every == 0):
            disk.append(step)
            most = max(most, len(disk))
            disk = sorted(set(disk) - set(superseded(disk, step, config)))
    assert (found.num_kept, found.num_existing) == (len(disk), len(existing))
    if run_steps > max(existing, default=0):
        assert max(found.num_peak, found.num_existing) >= most >= found.num_kept


def test_plan_disk_says_size_number_and_free_space_of_the_disk_and_warns_if_it_is_too_small(plan, tmp_path):
    settings = ["train.steps=100", "train.save_every=10"]
    fits = plan(10.5, [], *settings)
    for part in ("1.0 GB each", "10 kept", "10.0 GB", "10.5 GB are free", str(tmp_path)):
        assert part in str(fits)
    assert fits.warnings() == [] and fits.folder == tmp_path
    [warning] = plan(7.5, [], *settings).warnings()
    assert "2.5 GB" in warning and "checkpoint.keep_last" in warning
    [reserve] = plan(10.5, [], *settings, "checkpoint.min_free_gib=1").warnings()
    assert "0.6 GB" in reserve
    assert plan(7.5, [10, 20, 30], *settings).warnings() == []
    assert plan(0, [100], *settings).warnings() == []  # done


def test_plan_disk_rotation_needs_room_for_one_more(plan):
    settings = ["train.steps=100", "train.save_every=10", "checkpoint.keep_last=3"]
    assert plan(4.5, [], *settings).warnings() == []
    assert len(plan(3.5, [], *settings).warnings()) == 1


def test_next_checkpoint_needs_its_own_size_and_the_reserve(plan):
    found = plan(0.5, [], "train.steps=100", "checkpoint.min_free_gib=2")
    assert found.next_bytes == found.checkpoint_bytes + 2 * 2**30 > found.free_bytes


def test_plan_disk_existing_checkpoints_that_the_next_save_deletes_are_named(plan):
    settings = ["train.steps=100", "train.save_every=10", "checkpoint={keep_last: 2, keep_every: 20}"]
    [warning] = plan(100, [10, 20, 30, 50, 60], *settings).warnings()
    assert "10, 30, 50" in warning and "checkpoint.keep_last" in warning
    assert plan(100, [20, 60, 70], *settings).warnings() == []  # one at a time is usual
