"""Where the time of a run went: each second from its first start to its last line belongs to exactly one part.

An attempt is the part of a launch from its start, or from a rollback, to the next of these or to the end of the launch.
Attempt i does the steps after `first_i`. The steps up to the smallest `first` of all later attempts are kept; the later
ones are repeated, so metrics.jsonl no longer has them, and everything after the last kept line of the attempt is lost
time. Kept steps lie on the timeline by the time at which their lines were written.

    start      kept steps, validations, checkpoints        lost steps   end of launch              start
      |- starts -|- steps -|- validation -|- checkpoints -|- repeated -|- waiting -|- starts ------|

`goodput` is the time of the kept steps, divided by the sum of all parts, as `run/goodput` in metrics.jsonl is.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from megatron_bipe.monitor.history import FloatArray, RunHistory
from megatron_bipe.run_files import DONE, START, STOP, TIME
from megatron_bipe.train.metrics_file import SAVE_FAILED, SAVED, STEP_TIME

RETURN = "return"


class Hours(NamedTuple):
    """Seconds of a run by part; `wall_s` is their sum."""

    steps: float = 0.0
    """Kept steps."""
    validation: float = 0.0
    checkpoints: float = 0.0
    """Time that training waited for checkpoints; writing in the background is not counted."""
    repeated: float = 0.0
    """From the last kept line of an attempt to its end: lost steps, and the time until the failure was noticed."""
    starts: float = 0.0
    """From the start of the process to the first step; before the first `start` event only that after it."""
    waiting: float = 0.0
    """Between the end of a launch and the start of the next process; its start-up, too, if it is not recorded."""
    other: float = 0.0
    """Rest, such as checks between steps; negative if the clock was set back."""

    @property
    def wall_s(self) -> float:
        return math.fsum(self)

    @property
    def goodput(self) -> float:
        return self.steps / self.wall_s if self.wall_s > 0 else math.nan


class Attempt(NamedTuple):
    """A part of a launch without repeated steps."""

    first: int  # updates done before
    kept: float  # last step that is kept; infinity: all
    reached: int | None  # last step that was done, if known
    began_s: float
    ended_s: float
    is_start: bool  # False: it began with a rollback
    is_clean: bool  # it ended on purpose

    @property
    def repeated_steps(self) -> int | None:
        """Number of lost steps; None if it is not known."""
        if self.kept == math.inf:
            return 0
        return None if self.reached is None else max(0, self.reached - int(max(self.kept, self.first)))


def account_hours(history: RunHistory) -> Hours:
    """Return the parts of a run's time; all are 0 before its first start."""
    parts = dict.fromkeys(Hours._fields, 0.0)
    attempts = list_attempts(history)
    saved = {event["step"] for event in history.events if event["event"] in (SAVED, SAVE_FAILED) and "step" in event}
    for attempt in attempts:
        for part, seconds in _within(attempt, history, saved):
            parts[part if seconds >= 0 else "other"] += seconds
    starts = iter(event for event in history.events if event["event"] == START)
    next(starts, None)
    for before, after in pairwise(attempts):
        if after.is_start:
            gap_s = after.began_s - before.ended_s
            launched_s = next(starts).get("launched_at") or after.began_s
            start_s = min(max(after.began_s - launched_s, 0.0), max(gap_s, 0.0))
            parts["starts"] += start_s
            parts["waiting"] += gap_s - start_s
    return Hours(**parts)


def list_attempts(history: RunHistory) -> list[Attempt]:
    """Return the attempts of a run, in order; they cover its time except for that between launches."""
    begins = [
        number
        for number, event in enumerate(history.events)
        if (event["event"] == START and "step" in event) or (event["event"] == RETURN and number and "to_step" in event)
    ]
    while begins and history.events[begins[0]]["event"] == RETURN:  # the line of the first start is damaged
        begins.pop(0)
    firsts = [_first_step(history.events[number]) for number in begins]
    attempts = []
    for index, number in enumerate(begins):
        stop = begins[index + 1] if index + 1 < len(begins) else len(history.events)
        event, following = history.events[number], history.events[stop] if stop < len(history.events) else None
        kept = min(firsts[index + 1 :], default=math.inf)
        ended_s, is_clean = _end(history, history.events[number:stop], following, firsts[index], kept)
        attempts.append(
            Attempt(
                firsts[index],
                kept,
                _reached(following) if following else history.num_steps,
                event[TIME],
                ended_s,
                event["event"] == START,
                is_clean,
            )
        )
    return attempts


def _first_step(event: dict[str, Any]) -> int:
    return int(event["to_step"] if event["event"] == RETURN else event["step"])


def _reached(following: dict[str, Any]) -> int | None:
    """Return the last step before a start or rollback; starts of earlier versions do not record it."""
    if following["event"] == RETURN:
        return int(following["step"])
    return int(_before(following).get("step", 0)) if "before" in following else None


def _before(start: dict[str, Any]) -> dict[str, Any]:
    """Return step and time of the last line before a start; empty if there was none."""
    before = start.get("before")
    return before if isinstance(before, dict) else {}


def _end(
    history: RunHistory, own: Sequence[dict[str, Any]], following: dict[str, Any] | None, first: int, kept: float
) -> tuple[float, bool]:
    """Return the end of an attempt, the time of its last line, and whether it ended on purpose."""
    clean = [event[TIME] for event in own if event["event"] in (STOP, DONE)]
    if clean:
        return clean[-1], True
    if following is not None and following["event"] == RETURN:
        return following[TIME], False
    times = [event[TIME] for event in own]
    lines = _rows(history, first, kept)
    times += [history.columns_N[TIME][lines][-1]] if lines.any() else []
    times += [line.time_s for line in history.validations if first <= line.step <= kept]
    if following is not None:
        times.append(_before(following).get(TIME) or -math.inf)
        times = [min(time_s, following[TIME]) for time_s in times]
    return float(np.nanmax([*times, own[0][TIME]])), False


def _rows(history: RunHistory, first: int, kept: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    steps_N = history.columns_N["step"]
    return np.asarray((steps_N > first) & (steps_N <= kept))


def _within(attempt: Attempt, history: RunHistory, saved: set[int]) -> Iterator[tuple[str, float]]:
    """Yield parts of an attempt and their seconds, whose sum is its duration."""
    at_s, last_step, is_first = attempt.began_s, attempt.first, True
    begin = "starts" if attempt.is_start else "repeated"
    for time_s, step_s, step in _marks(attempt, history):
        if math.isnan(step_s):
            yield "validation", time_s - at_s
        else:
            yield "steps", step_s
            part = begin if is_first else "checkpoints" if last_step in saved else "other"
            yield part, time_s - at_s - step_s
            is_first, last_step = False, step
        at_s = time_s
    tail = begin if is_first else "checkpoints" if last_step in saved else "other"
    is_lost = attempt.repeated_steps or (attempt.kept < math.inf and not attempt.is_clean)
    yield ("repeated" if is_lost else tail), attempt.ended_s - at_s


def _marks(attempt: Attempt, history: RunHistory) -> list[tuple[float, float, int]]:
    """Return (end, seconds of its steps, last step) of each group of kept steps; of validations the seconds are NaN.

    Steps that were written together have the same `time/step_s`, and their lines nearly the same time.
    """
    rows = _rows(history, attempt.first, attempt.kept)
    columns = {key: history.columns_N[key][rows] for key in ("step", TIME, STEP_TIME) if key in history.columns_N}
    marks = list(_groups(columns, attempt)) if rows.any() else []
    marks += [
        (line.time_s, math.nan, line.step)
        for line in history.validations
        if attempt.began_s <= line.time_s <= attempt.ended_s and line.step <= attempt.kept
    ]
    return sorted(marks)


def _groups(columns: dict[str, FloatArray], attempt: Attempt) -> Iterator[tuple[float, float, int]]:
    step_s_N, steps_N = columns[STEP_TIME], columns["step"]
    stops = np.flatnonzero(np.append(np.diff(step_s_N) != 0, True))
    sums = np.diff(np.append(0.0, np.cumsum(step_s_N)[stops]))
    ends = columns[TIME][stops]
    if np.isnan(ends).any():  # lines of earlier versions have no time
        ends = np.minimum(attempt.began_s + np.cumsum(sums), attempt.ended_s)
    yield from zip(ends.tolist(), sums.tolist(), steps_N[stops].astype(int).tolist(), strict=True)
