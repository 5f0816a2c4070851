"""The order of a step, with an engine that only takes notes."""

import pytest

from megatron_bipe.config.load import load_run_config
from megatron_bipe.engine.api import StepResult
from megatron_bipe.train.loop import train
from megatron_bipe.train.schedule import learning_rate


class Notes:
    """Engine, feed, metrics and watchdog in one: everything that was asked of them, in order."""

    has_valid = True

    def __init__(self):
        self.calls = []

    def train_step(self, micro_batches, lr):
        self.calls.append(("step", micro_batches, lr))
        return StepResult(0.0, 0.0)

    def eval_loss(self, batches):
        self.calls.append(("eval", batches))
        return 1.0

    def save(self, run_dir, step, *, final):
        self.calls.append(("save", step, final))

    def train_batches(self, step):
        return f"batches {step}"

    def valid_batches(self):
        return "valid"

    def step(self, step, result, lr):
        pass

    def valid(self, step, loss):
        pass

    def flush(self):
        pass

    def at(self, place):
        pass

    def over(self, place, batches):
        return batches

    restart_clock = flush


@pytest.fixture
def run():
    return load_run_config(
        None, ["train.steps=6", "train.valid_every=2", "train.save_every=4", "optimizer.warmup_steps=2"]
    )


def test_train_steps_validate_and_save_when_due(run):
    notes = Notes()
    train(run, notes, notes, notes, notes, start=0, stop=6)
    names = [call[0] for call in notes.calls]
    assert names == ["step", "step", "eval", "step", "step", "eval", "save", "step", "step", "eval", "save"]
    assert notes.calls[3] == ("step", "batches 2", learning_rate(run.optimizer, 6, 2))


def test_train_stopped_early_saves_and_keeps_the_schedule(run):
    notes = Notes()
    train(run, notes, notes, notes, notes, start=3, stop=5)
    assert [call for call in notes.calls if call[0] == "save"] == [("save", 4, False), ("save", 5, True)]
    assert notes.calls[0] == ("step", "batches 3", learning_rate(run.optimizer, 6, 3))


def test_train_without_intervals_saves_once_at_the_end(run):
    quiet = run.model_copy(update={"train": run.train.model_copy(update={"valid_every": 0, "save_every": 0})})
    notes = Notes()
    train(quiet, notes, notes, notes, notes, start=0, stop=6)
    assert [call[0] for call in notes.calls] == ["step"] * 6 + ["eval", "save"]
