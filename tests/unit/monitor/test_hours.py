"""The parts of a run's time are those that it spent, and their sum is its time."""

import math

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from megatron_bipe.monitor.history import read_history
from megatron_bipe.monitor.hours import account_hours, list_attempts
from tests.helpers.recorded_runs import RecordedRun


def spent(hours):
    return {part: seconds for part, seconds in hours._asdict().items() if seconds}


def test_each_part_is_found(tmp_path):
    run = RecordedRun(tmp_path).start(setup_s=2.0).steps(8).validate(3.0).save(1.5).steps(8, 0.75)
    run.fail(8, noticed_s=20.0).start(waited_s=60.0, loading_s=10.0).steps(4).roll_back(8, 2.5).steps(8).save(
        0.5
    ).stop()
    hours = account_hours(read_history(run.write()))
    expected = {"steps": 8.0, "validation": 3.0, "checkpoints": 0.5, "starts": 12.0, "waiting": 60.0}
    # 1.5 s of the first checkpoint, the steps after it, and the time until their loss was noticed, are lost.
    assert spent(hours) == expected | {"repeated": 1.5 + 6.0 + 20.0 + 2.0 + 2.5} == run.seconds
    assert hours.wall_s == run.time_s - run.events[0]["time"]
    assert hours.goodput == 8.0 / hours.wall_s
    assert [attempt.repeated_steps for attempt in list_attempts(read_history(tmp_path))] == [8, 4, 0]


def test_falling_back_further_loses_steps_of_earlier_launches(tmp_path):
    run = RecordedRun(tmp_path).start().steps(8).save().steps(8, 0.25).save(1.0).fail(16)
    run.start().steps(4, 0.75).fail(8).start().steps(16, 0.125).save().stop("done")
    hours = account_hours(read_history(run.write()))
    assert (hours.steps, hours.repeated) == (4.0 + 2.0, 2.0 + 1.0 + 3.0)
    assert spent(hours) == run.seconds


EIGHTHS = st.integers(0, 80).map(lambda number: number / 8)
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["steps", "validate", "save", "fail", "roll_back", "stop"]), EIGHTHS, EIGHTHS),
    max_size=25,
)


@given(actions=ACTIONS)
@settings(max_examples=150, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_parts_of_any_run_sum_to_its_time(tmp_path_factory, actions):
    run = RecordedRun(tmp_path_factory.getbasetemp() / "any").start(setup_s=1.0)
    saved = [0]
    for count, (action, one, other) in enumerate(actions):
        if action == "steps":
            run.steps(1 + int(other), 0.125 + one + count)  # no two groups have the same time
        elif action == "validate" and run.has_trained and run.step != saved[-1]:  # as training does, before it saves
            run.validate(0.125 + one)
        elif action == "save" and run.step > saved[-1]:
            saved.append(run.step)
            run.save(one)
        elif action in ("fail", "roll_back") and saved[-1] < run.step:
            if other > 7 and len(saved) > 1:
                saved.pop()  # the newest checkpoint is damaged
            to_step = saved[-1]
            run.roll_back(to_step, one, other) if action == "roll_back" else run.fail(to_step, one).start(
                other, one, 1.0
            )
        elif action == "stop" and run.step == saved[-1]:
            run.stop().start(one, other, 0.5)
    if run.step != saved[-1]:
        run.steps(1, 1000.0)
    run.stop()
    hours = account_hours(read_history(run.write()))
    assert hours.wall_s == run.time_s - run.events[0]["time"]
    assert hours.repeated == run.seconds.get("repeated", 0)
    assert hours.steps == run.seconds.get("steps", 0)
    assert hours.validation == run.seconds.get("validation", 0)


def test_goodput_equals_that_of_the_run(tmp_path):
    """`run/goodput`: time of all steps in metrics.jsonl over the time since the first start."""
    run = RecordedRun(tmp_path).start().steps(8).fail(0, 5.0).start(20.0).steps(8).save(1.0).stop("done")
    hours = account_hours(read_history(run.write()))
    step_time_s = sum(line.get("time/step_s", 0) for line in run.lines)
    assert hours.goodput == step_time_s / (run.events[-1]["time"] - run.events[0]["time"])


def test_starts_of_earlier_versions_count_their_loading_as_waiting(tmp_path):
    run = RecordedRun(tmp_path).start().steps(4).save().steps(4).fail(4).start(30.0, 10.0).steps(4).stop()
    for event in run.events:
        for key in ("launched_at", "before"):
            event.pop(key, None)
    history = read_history(run.write())
    hours = account_hours(history)
    assert (hours.waiting, hours.starts) == (40.0, 0.0)
    assert [attempt.repeated_steps for attempt in list_attempts(history)] == [None, 0]


def test_lines_without_time_keep_the_sum(tmp_path):
    run = RecordedRun(tmp_path).start().steps(4).save(1.0).steps(4, 0.25).stop()
    for line in run.lines:
        del line["time"]
    hours = account_hours(read_history(run.write()))
    assert hours.steps == 3.0 and hours.wall_s == 4.0


def test_killed_launch_ends_with_its_last_line(tmp_path):
    run = RecordedRun(tmp_path).start().steps(4).save().steps(8)
    run.step, died_at = 4, run.time_s
    run.start(waited_s=100.0).steps(8, 0.25).stop("done")
    hours = account_hours(read_history(run.write()))
    assert (hours.repeated, hours.waiting) == (4.0, 100.0)
    assert list_attempts(read_history(tmp_path))[0].ended_s == died_at


@pytest.mark.parametrize("events", [[], [{"time": 1.0, "event": "return", "step": 3, "to_step": 2}]])
def test_run_without_a_start_has_no_hours(tmp_path, events):
    run = RecordedRun(tmp_path)
    run.events = events
    hours = account_hours(read_history(run.write()))
    assert hours.wall_s == 0 and math.isnan(hours.goodput)
