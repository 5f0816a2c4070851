"""The command after each checkpoint: in order, in the background, and never in the way of the run."""

import os
import time
from pathlib import Path

import pytest
import torch

from megatron_bipe.checkpoint.find import list_steps, step_folder
from megatron_bipe.checkpoint.shard_files import KINDS, Fragment
from megatron_bipe.checkpoint.writer import CheckpointWriter
from megatron_bipe.config import CheckpointConfig
from megatron_bipe.run_files import read_events
from megatron_bipe.runtime.host_collectives import HostCollectives
from megatron_bipe.train.after_save import AfterSave
from megatron_bipe.train.metrics_file import Events, RunObserver
from tests.helpers.checkpoints import checkpoint_info
from tests.helpers.errors import assert_warned
from tests.helpers.loop import MAIN

GATE = 'while [ ! -e "$BIPE_RUN_DIR/gate" ]; do sleep 0.02; done'
NOTE = 'echo "$BIPE_STEP $(basename "$BIPE_CHECKPOINT")" >> "$BIPE_RUN_DIR/done"'


class Run:
    """A run folder in which checkpoints are saved, and a command after each of them."""

    def __init__(self, folder, command, **settings):
        self.folder, self.beats = folder, []
        events = Events(folder, True)
        fail = lambda step, reason: events.add("after save failed", step=step, reason=reason)  # noqa: E731
        self.after_save = AfterSave(command, folder, fail)
        config = CheckpointConfig(min_free_gib=0, asynchronous=False, **settings)
        self.writer = CheckpointWriter(config, MAIN, HostCollectives(MAIN), lambda: None)
        self.writer.observer = RunObserver(events, lambda: None, self.after_save)

    def save(self, *steps):
        fragments = [Fragment("0.x", (4,), None, 0, {kind: torch.zeros(4) for kind in KINDS})]
        for step in steps:
            self.writer.save(self.folder, checkpoint_info(step), fragments, {}, final=False)

    def close(self, limit_s=30.0):
        self.after_save.close(limit_s, lambda: self.beats.append(1))

    @property
    def done(self):
        path = self.folder / "done"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def failures(self):
        found = [event for event in read_events(self.folder) if event["event"] == "after save failed"]
        return {event["step"]: event["reason"] for event in found}


@pytest.fixture
def runs(tmp_path):
    """Return a function that starts a run; it is over after the test."""
    started = []
    yield lambda command, **settings: started.append(Run(tmp_path, command, **settings)) or started[-1]
    for run in started:
        run.close(0.0)
        run.writer.close()


def wait_for(is_true):
    until_s = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_after_save_runs_for_each_checkpoint_in_order_while_saves_go_on(runs):
    run = runs(f"{GATE}; {NOTE}")
    run.save(1, 2, 3)  # none waits for the command
    assert run.done == [] and list_steps(run.folder) == [1, 2, 3]
    (run.folder / "gate").touch()
    run.close()
    assert run.done == [f"{step} step-0000000{step}" for step in (1, 2, 3)] and run.beats and run.failures == {}


def test_after_save_that_fails_is_an_event_with_the_end_of_its_output_and_the_next_ones_run(runs, caplog):
    run = runs(f"{NOTE}; echo upload refused >&2; [ $BIPE_STEP != 2 ]")
    run.save(1, 2, 3)
    run.close()
    assert len(run.done) == 3 and list(run.failures) == [2]
    assert "exit code 1" in run.failures[2] and "upload refused" in run.failures[2]
    assert_warned(caplog, "step 2", "upload refused", step_folder(run.folder, 2))


def test_after_save_of_no_such_program_is_an_event(runs):
    run = runs("/no/such/program")
    run.save(1)
    run.close()
    assert "exit code 127" in run.failures[1] and "/no/such/program" in run.failures[1]


def test_after_save_keeps_the_checkpoint_that_it_works_on_and_skips_those_deleted_before_their_turn(runs):
    run = runs(f"{GATE}; {NOTE}", keep_last=1)
    run.save(1)
    wait_for(lambda: run.after_save.steps_in_use())
    run.save(2, 3)
    assert list_steps(run.folder) == [1, 3]
    (run.folder / "gate").touch()
    run.close()
    assert [line.split()[0] for line in run.done] == ["1", "3"]
    assert list(run.failures) == [2] and "keep_last" in run.failures[2]
    run.save(4)
    assert list_steps(run.folder) == [4]


def test_after_save_that_hangs_is_ended_with_all_it_started_at_the_limit(runs):
    run = runs('sleep 1000 & echo $! > "$BIPE_RUN_DIR/child"; wait')
    run.save(1, 2)
    wait_for(lambda: (run.folder / "child").exists() and (run.folder / "child").read_text())
    run.close(0.1)
    assert set(run.failures) == {1, 2} and "too long" in run.failures[1] and "before its turn" in run.failures[2]
    pid = int((run.folder / "child").read_text())
    wait_for(lambda: not _is_alive(pid))


def _is_alive(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
