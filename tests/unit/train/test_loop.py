"""The order of a step, with an engine that only records calls."""

import json
import signal
from types import SimpleNamespace

import pytest

from megatron_bipe.checkpoint.find import step_folder
from megatron_bipe.config.load import load_run_config
from megatron_bipe.engine.interface import LossSums
from megatron_bipe.errors import HealthError
from megatron_bipe.run_files import read_events
from megatron_bipe.runtime.child_processes import STOP_SIGNALS
from megatron_bipe.runtime.preemption import StopRequest
from megatron_bipe.train.metrics import Metrics
from megatron_bipe.train.metrics_file import Events
from megatron_bipe.train.profile import Profile
from megatron_bipe.train.read_ahead import ReadAhead
from megatron_bipe.train.rollback import Rollback
from megatron_bipe.train.schedule import learning_rate
from megatron_bipe.train.train_state import TrainState
from megatron_bipe.train.trainer import Trainer
from megatron_bipe.train.validation import Validation
from tests.helpers.errors import assert_warned, raises
from tests.helpers.loop import MAIN, Notes, NumberedBatches


@pytest.fixture
def start(tmp_path):
    """Return a function that trains with recorded calls, and returns these and the training state."""

    def started(*settings, start=0, stop=6, bad_steps=(), stop_request=None, state=None, notes=None, loader=None):
        base = ["train.steps=6", "train.valid_every=2", "train.save_every=4", "optimizer.warmup_steps=2"]
        run = load_run_config(None, [f"run_dir={tmp_path}", *base, *settings])
        notes = notes or Notes(tmp_path, [256 * (step - 1) for step in bad_steps])
        events = Events(tmp_path, True)
        state = state or TrainState(step=start, samples=256 * start)
        metrics = Metrics(run, MAIN, state, None)
        rollback = Rollback(run, notes, loader or notes, events, state)
        profile = Profile(0, tmp_path, MAIN)
        trainer = Trainer(run, MAIN, notes, loader or notes, notes, stop_request or StopRequest(), profile)
        end = trainer.train(state, metrics, rollback, stop)
        metrics.close()
        return SimpleNamespace(notes=notes, end=end, run=run, run_dir=tmp_path)

    return started


def test_train_steps_validate_and_save_when_due(start):
    done = start()
    assert done.notes.names == ["step", "step", "eval", "step", "step", "eval", "save", "step", "step", "eval", "save"]
    assert done.notes.calls[3] == ("step", 512, learning_rate(done.run.optimizer, 6, 2))


@pytest.mark.parametrize(("begin", "shown"), [(0, [1, 5, 10, 12]), (7, [8, 10, 12])])
def test_train_shows_progress_after_the_first_step_then_when_due(start, caplog, begin, shown):
    with caplog.at_level("INFO"):
        start("train.steps=12", "train.log_every=5", "train.valid_every=0", "train.save_every=0", start=begin, stop=12)
    assert [int(line.split("/")[0].split()[-1]) for line in caplog.messages if "/12 |" in line] == shown


def test_train_records_each_validation(start):
    done = start()
    events = [event for event in read_events(done.run_dir) if event["event"] == "validation"]
    assert [(event["step"], event["loss_nats"]) for event in events] == [(2, 1.0), (4, 1.0), (6, 1.0)]


def test_train_records_all_lengths_of_the_first_validation_set(start):
    notes = Notes(None)
    notes.validations = [Validation(name, length, None, None) for name in ("a", "b") for length in (512, 1024)]
    sums = iter([LossSums([nats] * 16, [1.0] * 16) for nats in (3.0, 2.0, 5.0, 6.0)] * 3)
    notes.eval_loss = lambda batches: next(sums)
    done = start(notes=notes)
    events = [event for event in read_events(done.run_dir) if event["event"] == "validation"]
    assert [event["step"] for event in events] == [2, 4, 6]
    for event in events:
        assert (event["loss_nats"], event["set"]) == (2.0, "a")
        assert event["nats_by_length"] == {"512": 3.0, "1024": 2.0}


def test_train_stopped_between_validations_repeats_all_of_them(start, stop_request):
    notes = Notes(None)
    notes.validations = [Validation(name, 1024, None, None) for name in ("a", "b", "c")]
    notes.valid_batches = lambda _: range(2)
    evaluated = []

    def interrupt():
        evaluated.append(None)
        if len(evaluated) == 3:  # the first batch of the second set
            signal.raise_signal(signal.SIGTERM)

    notes.in_validation = interrupt
    done = start(stop_request=stop_request, notes=notes)
    assert notes.names == ["step", "step", "eval", "eval", "eval", "save"] and done.end.valid_owed
    assert '"loss/valid_nats"' not in (done.run_dir / "metrics.jsonl").read_text()
    notes.calls.clear()
    again = start(state=TrainState.at(2, 256, notes.loop_states[step_folder(done.run_dir, 2)]), notes=notes, stop=2)
    assert notes.names == ["eval"] * 6 and not again.end.valid_owed


def test_train_stopped_early_saves_and_keeps_the_schedule(start):
    done = start(start=3, stop=5)
    assert done.notes.of("save") == [4, 5]
    assert done.notes.calls[0] == ("step", 768, learning_rate(done.run.optimizer, 6, 3))


def test_train_without_intervals_saves_once_at_the_end(start):
    assert start("train.valid_every=0", "train.save_every=0").notes.names == ["step"] * 6 + ["eval", "save"]


def test_train_asked_to_stop_in_a_step_finishes_it_and_saves(start):
    times = iter([0.0, 1.0, 2.0, 20.0, *[30.0] * 9])  # when it is made, before the first step, after each
    done = start(stop_request=StopRequest(15.0, lambda: next(times)))
    assert done.notes.names == ["step", "step", "save"] and done.end.step == 2
    assert done.end.valid_owed  # due after step 2, and pending
    again = start(state=TrainState.at(2, 256, done.notes.loop_states[step_folder(done.run_dir, 2)]))
    assert again.notes.names == ["eval", "step", "step", "eval", "save", "step", "step", "eval", "save"]


def test_train_resumed_without_validation_data_drops_the_pending_validation(start, tmp_path):
    notes = Notes(tmp_path)
    notes.has_valid = False
    done = start(start=2, state=TrainState(step=2, samples=512, valid_owed=True), notes=notes)
    assert notes.names == ["step", "step", "save", "step", "step", "save"] and not done.end.valid_owed


def test_train_asked_to_stop_before_the_first_step_does_none(start):
    done = start(stop_request=StopRequest(-1.0))
    assert done.notes.names == [] and done.end.step == 0


@pytest.fixture
def stop_request():
    """Return a stop request with installed signal handlers."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    request = StopRequest()
    request.install_handlers()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


def test_train_asked_to_stop_while_it_saves_does_one_more_step_whose_checkpoint_is_the_last(start, stop_request):
    notes = Notes(None)
    notes.in_save = lambda: signal.raise_signal(signal.SIGTERM)
    done = start("train.save_every=2", "train.valid_every=0", stop_request=stop_request, notes=notes)
    assert [call for call in notes.calls if call[0] == "save"] == [("save", 2, False), ("save", 3, True)]
    assert done.end.step == 3 and stop_request.is_agreed


def test_train_stopped_in_a_validation_aborts_it_and_marks_it_pending(start, stop_request):
    notes = Notes(None)
    notes.valid_batches = lambda _: range(100)
    notes.in_validation = lambda: signal.raise_signal(signal.SIGTERM)
    done = start(stop_request=stop_request, notes=notes)
    assert notes.names == ["step", "step", "eval", "save"] and done.end.valid_owed
    assert '"loss/valid_nats"' not in (done.run_dir / "metrics.jsonl").read_text()


def test_train_last_step_bad_without_a_checkpoint_is_kept(start, caplog):
    done = start("train.save_every=0", bad_steps=[6])
    assert done.notes.of("save") == [6] and done.end.step == 6
    assert_warned(caplog, "step 6", "checkpoint")
    trouble = start("train.save_every=0", "health.patience=2", bad_steps=[6])
    assert trouble.notes.of("save") == [6]  # one is not trouble
    with raises(HealthError, "2 bad steps", "step 6", "checkpoint", remedy="optimizer.lr"):
        start("train.save_every=0", "health.patience=2", bad_steps=[5, 6])


def test_train_pending_validation_is_repeated_after_a_rollback(start):
    times = iter([0.0, 1.0, 2.0, 20.0, *[30.0] * 9])
    stopped = start("health.patience=2", stop_request=StopRequest(15.0, lambda: next(times)))
    assert stopped.end.step == 2 and stopped.end.valid_owed
    notes = stopped.notes
    notes.calls.clear()
    notes.bad_samples = [256 * step for step in (2, 3)]
    state = TrainState.at(2, 256, notes.loop_states[step_folder(stopped.run_dir, 2)])
    again = start("health.patience=2", state=state, notes=notes)
    assert notes.names[:5] == ["eval", "step", "step", "load", "eval"]
    lines = [json.loads(line) for line in (again.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/valid_nats" in line] == [2, 4, 6]


def test_train_single_bad_step_is_recorded_and_training_continues(start):
    done = start(bad_steps=[3])
    assert done.notes.of("step") == [256 * step for step in range(6)]
    event = next(event for event in read_events(done.run_dir) if event["event"] == "bad step")
    assert event["step"] == 3 and event["samples"] == [512, 768] and event["windows"] == list(range(512, 768))


def test_train_does_not_save_after_a_bad_step_but_after_the_next_good_one(start):
    done = start("train.save_every=2", bad_steps=[2])
    assert done.notes.of("save") == [3, 4, 6]


def test_train_consecutive_bad_steps_roll_back_and_skip_their_samples(start):
    done = start("train.save_every=1", "health.patience=2", bad_steps=[3, 4])
    assert done.notes.of("load") == ["step-00000002"]
    assert done.notes.of("step") == [256 * number for number in (0, 1, 2, 3, 4, 5, 6, 7)]
    assert done.end.step == 6 and done.end.samples == 8 * 256
    lines = (done.run_dir / "metrics.jsonl").read_text()
    assert [lines.count(f'"step":{step},') for step in range(1, 7)] == [1, 2, 1, 2, 1, 2]  # even ones are validated
    assert "null" not in lines


class ReadingNotes(Notes):
    """Notes whose engine reads the batches of a step."""

    def train_step(self, batches, lr):
        first, second = (int(batch.tokens_BT[0, 0]) for batch in batches)
        assert second == first + 128
        return super().train_step(first, lr)


def test_train_with_batches_read_in_advance_rolls_back_and_skips_the_same_samples(start, tmp_path):
    notes = ReadingNotes(tmp_path, bad_samples=[2 * 256, 3 * 256, 5 * 256, 6 * 256])
    source = NumberedBatches(global_batch=256, num_micro_batches=2)
    with ReadAhead(source, lambda batch: batch) as loader:
        done = start("train.save_every=1", "health.patience=2", notes=notes, loader=loader)
    assert done.notes.of("step") == [256 * number for number in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)]
    assert done.notes.of("load") == ["step-00000002", "step-00000003"]


def test_train_good_steps_between_checkpoint_and_trouble_are_done_again(start):
    done = start("train.save_every=2", "health.patience=2", bad_steps=[4, 5])
    assert done.notes.of("load") == ["step-00000002"]
    assert done.notes.of("step") == [256 * number for number in (0, 1, 2, 3, 4, 2, 5, 6, 7)]


def test_train_second_rollback_also_skips_the_samples_of_the_first(start):
    done = start("train.save_every=2", "health.patience=2", bad_steps=[4, 5, 6, 7])
    assert done.notes.of("load") == ["step-00000002"] * 2
    assert done.notes.of("step")[-4:] == [256 * number for number in (2, 7, 8, 9)]


def test_train_rollback_to_an_older_checkpoint_also_skips_the_samples_that_it_lists(start):
    first = start("train.save_every=2", "health.patience=2")
    notes = first.notes
    for step in (4, 6):  # damaged since
        step_folder(first.run_dir, step).rmdir()
    notes.loop_states[step_folder(first.run_dir, 2)]["pass_over"] = [[256 * 3, 256 * 4]]
    notes.calls.clear()
    notes.bad_samples = [256 * step for step in (5, 6)]
    state = TrainState(step=4, samples=256 * 5)  # that sample was skipped before
    done = start("health.patience=2", state=state, notes=notes)
    assert notes.of("load") == ["step-00000002"]
    assert notes.of("step") == [256 * number for number in (5, 6, 2, 4, 7, 8)]
    assert done.end.step == 6 and done.end.samples == 256 * 9


def test_train_trouble_that_is_detected_late_leads_to_the_same_result(start):
    done = start(
        "train.save_every=2", "health.patience=2", "train.log_every=5", "train.valid_every=0", bad_steps=[3, 4]
    )
    assert done.notes.of("step") == [256 * number for number in (0, 1, 2, 3, 4, 5, 6, 7)]
    assert done.notes.of("load") == ["step-00000002"]


def test_train_bad_last_step_rolls_back_instead_of_saving(start):
    done = start("train.save_every=1", bad_steps=[6])
    assert done.notes.of("load") == ["step-00000005"] and done.notes.of("step")[-1] == 6 * 256
    assert done.notes.of("save")[-1] == 6


def test_train_asked_to_stop_after_a_bad_step_saves_nothing(start):
    times = iter([0.0, 1.0, 2.0, 3.0, 20.0, *[30.0] * 9])
    done = start("train.save_every=2", bad_steps=[3], stop_request=StopRequest(15.0, lambda: next(times)))
    assert done.notes.of("save") == [2] and done.end.step == 3


def test_train_trouble_without_a_checkpoint_is_an_error(start):
    with raises(HealthError, "2 bad steps", "step 2", "checkpoint", remedy="optimizer.lr"):
        start("health.patience=2", bad_steps=[1, 2])


def test_train_recurring_trouble_ends_the_run(start):
    with raises(HealthError, "1 bad steps", "step 3", "step 2", "2 times", remedy="optimizer.lr"):
        start("train.save_every=2", "health.patience=1", "health.max_returns=2", bad_steps=[3, 4, 5, 6, 7])
