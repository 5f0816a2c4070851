"""The state of a run as its folder shows it: running, silent, stopped, failed or done, and when it will finish."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_bipe.monitor.history import RunHistory
from megatron_bipe.monitor.hours import Hours
from megatron_bipe.run_files import DONE, FAILED, START, STOP, TIME
from megatron_bipe.train.metrics_file import STEP_TIME

StateName = Literal["not started", "running", "silent", "stopped", "failed", "done"]
RECENT_STEPS = 1000  # whose median time predicts the remaining ones


class RunState(NamedTuple):
    """State of a run at a time."""

    name: StateName
    age_s: float | None
    """Age of the last line of metrics.jsonl or events.jsonl; None: there is no line."""
    step: int
    finishes_at_s: float | None
    """Time of the last step, since 1970, if the run continues as before; None: not running, or not known."""


def run_state(history: RunHistory, hours: Hours, now_s: float) -> RunState:
    """Return the state of a run.

    A launch that makes no progress for `parallel.timeout_s` ends, so a run without a line for longer than that, and
    longer than a few intervals of its progress lines, is silent: its processes were probably killed.

    Args:
        history: the run.
        hours: its time by part.
        now_s: time of the question, since 1970.
    """
    times = [event[TIME] for event in history.events]
    times += [float(np.nanmax(history.columns_N[TIME]))] if np.isfinite(history.columns_N[TIME]).any() else []
    times += [line.time_s for line in history.validations if math.isfinite(line.time_s)]
    age_s = now_s - max(times) if times else None
    name = _name(history, age_s)
    step_s = _recent_step_s(history)
    left_s = (history.config.train.steps - history.num_steps) * step_s / hours.goodput if hours.steps else math.nan
    finishes = max(times) + left_s if name == "running" and math.isfinite(left_s) else None
    return RunState(name, age_s, history.num_steps, finishes)


def _name(history: RunHistory, age_s: float | None) -> StateName:
    last: dict[str, Any] = next(
        (event for event in reversed(history.events) if event["event"] in (START, STOP, DONE, FAILED)), {}
    )
    names: dict[str, StateName] = {STOP: "stopped", FAILED: "failed", DONE: "done"}
    if not last or age_s is None:
        return "not started"
    if last["event"] == DONE and last.get("step", 0) < history.config.train.steps:
        return "stopped"  # by --stop-step
    if last["event"] != START:
        return names[last["event"]]
    step_s = _recent_step_s(history)
    patience_s = max(history.config.parallel.timeout_s, 5 * history.config.train.log_every * np.nan_to_num(step_s))
    return "silent" if age_s > patience_s else "running"


def _recent_step_s(history: RunHistory) -> float:
    step_s_N = history.columns_N.get(STEP_TIME, np.empty(0))[-RECENT_STEPS:]
    return float(np.median(step_s_N)) if step_s_N.size else math.nan
