"""Sections of a run's page about its training: time, curves, speed, memory and events."""

import statistics
from collections import Counter
from html import escape

import numpy as np

from megatron_bipe.config import engine_config
from megatron_bipe.errors import BipeError
from megatron_bipe.estimate.memory import stage_memories
from megatron_bipe.eval.page import paragraph, table
from megatron_bipe.monitor.event_text import ROUTINE, duration, event_text, moment
from megatron_bipe.monitor.history import FloatArray, RunHistory
from megatron_bipe.monitor.hours import Hours, list_attempts
from megatron_bipe.monitor.result_sections import main_curve
from megatron_bipe.monitor.svg_chart import Mark, Plot, Series, draw, noisy
from megatron_bipe.run_files import START, TIME
from megatron_bipe.train.metrics_file import BAD_STEP, RETURN, SAVED, SLOW_RANK, STEP_TIME, VALIDATION

PART_TEXTS = {
    "steps": "steps that are kept",
    "validation": "validation",
    "checkpoints": "waiting for checkpoints",
    "repeated": "steps that were repeated, and noticing failures",
    "starts": "starting",
    "waiting": "between launches",
    "other": "other",
}
_MARK_KINDS = {START: "start", RETURN: "rollback", BAD_STEP: "bad step"}
_MAX_EVENTS, _MAX_MARKS = 200, 200


def hours_section(history: RunHistory, hours: Hours) -> str:
    """Return a bar and a table of the parts of the run's time."""
    if not hours.wall_s > 0:
        return paragraph("The run has not done a step yet.")
    shares = {part: seconds / hours.wall_s for part, seconds in hours._asdict().items()}
    bar = "".join(f'<i class="part {part}" style="flex:{max(share, 0):.5f}"></i>' for part, share in shares.items())
    rows = [
        [f'<i class="part {part}"></i>{escape(PART_TEXTS[part])}', duration(seconds), f"{shares[part]:.1%}"]
        for part, seconds in hours._asdict().items()
        if abs(seconds) > 5e-4 * hours.wall_s
    ]
    rows.append(["total", duration(hours.wall_s), ""])
    attempts = list_attempts(history)
    counts = [attempt.repeated_steps for attempt in attempts]
    known = sum(count or 0 for count in counts)
    steps = f"{known:,}" + (" or more" if None in counts else "")
    launches = sum(attempt.is_start for attempt in attempts)
    text = (
        f"Goodput is {hours.goodput:.1%}: the share of the time since the first start in which steps were done that "
        f"are kept. The run had {launches} launch{'es' * (launches != 1)}; {steps} steps were repeated."
    )
    return (
        paragraph(escape(text))
        + f'<div class="parts" aria-hidden="true">{bar}</div>\n'
        + table(["part", "time", "share"], rows, kind="wrap")
    )


def training_section(history: RunHistory) -> str:
    """Return the curves of loss, gradient norm and learning rate, with marks."""
    steps_N, marks = history.columns_N["step"], event_marks(history)
    curve = main_curve(history)
    validations = []
    if curve is not None:
        steps, nats = np.array(curve.steps, float), np.array(curve.nats)
        validations.append(Series(f"validation, {curve.label}", steps, nats, 1, has_dots=True))
    empty = np.full(steps_N.size, np.nan)
    loss_N, norm_N, lr_N = (
        history.columns_N.get(key, empty) for key in ("loss/train_nats", "optim/grad_norm", "optim/lr")
    )
    loss = [*noisy("training", steps_N, loss_N), *validations]
    plots = (
        Plot(loss, "step", "loss, nats per token", marks),
        Plot(noisy("", steps_N, norm_N), "step", "gradient norm before clipping", marks, log_y=True),
        Plot([Series("", steps_N, lr_N)], "step", "learning rate", marks),
    )
    return "".join(map(draw, plots)) or paragraph("No step is recorded yet.")


def event_marks(history: RunHistory) -> list[Mark]:
    """Return marks of restarts, rollbacks, branches and bad steps; the newest ones if there are many."""
    marks: list[Mark] = []
    for event in history.events:
        kind, step = _MARK_KINDS.get(event["event"]), event.get("step")
        if kind and isinstance(step, int) and (kind != "start" or step > 0):
            is_branch = bool(event.get("branch_from"))  # the curves begin with the step after it
            marks.append(Mark(step + is_branch, "branch" if is_branch else kind, event_text(event)))
    return marks[-_MAX_MARKS:]


def speed_section(history: RunHistory) -> str:
    """Return step times, rates, slow ranks, and peak memory next to the estimate."""
    step_s_N = history.columns_N.get(STEP_TIME, np.empty(0))
    if not step_s_N.size:
        return ""
    median_s, high_s = np.quantile(step_s_N, [0.5, 0.95])
    tokens = history.config.train.global_batch * history.config.train.seq_len_tokens
    rows = [
        ["step, median", f"{median_s:.4g} s"],
        ["step, 95th percentile", f"{high_s:.4g} s"],
        ["tokens per second, at the median", f"{tokens / median_s:,.0f}"],
    ]
    mfu_N = history.columns_N.get("util/mfu", np.empty(0))
    if np.isfinite(mfu_N).any():
        rows.append(["model FLOPs utilization, median", f"{np.nanmedian(mfu_N):.1%}"])
    slow = Counter(str(event.get("name")) for event in history.events if event["event"] == SLOW_RANK)
    rows += [[f"slow: {escape(name)}", f"{count} times"] for name, count in slow.most_common(5)]
    rows += _memory_rows(history)
    log_every = history.config.train.log_every
    note = f"Each value is the mean of the steps between two progress lines: {log_every} with train.log_every."
    plot = Plot(noisy("", history.columns_N["step"], step_s_N), "step", "time of a step, s", event_marks(history))
    return draw(plot) + table(["", ""], rows, kind="wrap") + paragraph(note, "note")


def _memory_rows(history: RunHistory) -> list[list[str]]:
    memory_N = history.columns_N.get("mem/peak_gib", np.empty(0))
    rows = [["peak memory of rank 0", f"{np.nanmax(memory_N):.2f} GiB"]] if np.isfinite(memory_N).any() else []
    estimate = _estimated_gib(history)
    if rows and estimate is not None:
        device, what = estimate
        rows.append([f"estimate of {what}", f"{device:.2f} GiB"])
    return rows


def _estimated_gib(history: RunHistory) -> tuple[float, str] | None:
    """Return the estimated memory of a rank of the first stage; None if the DeepSpeed settings are not recorded."""
    start = history.last_start
    if history.ds_settings is None:
        return None
    try:
        on_gpu = start["device_type"] == "cuda"
        ds_config = engine_config(history.config, history.ds_settings, start["ranks"], "events.jsonl")
        stage = stage_memories(history.config, ds_config, start["ranks"], on_gpu=on_gpu)[0]
    except (BipeError, AssertionError, KeyError, TypeError, ValueError, ArithmeticError):
        return None  # recorded by another version
    return stage.device / 2**30, "a rank" if on_gpu else "tensors; Python and its libraries come on top"


def events_section(history: RunHistory) -> str:
    """Return the events in words, newest first; saves and validations are counted."""
    listed = [event for event in history.events if event["event"] not in ROUTINE]
    counts = Counter(event["event"] for event in history.events)
    seconds = [event["seconds"] for event in history.events if isinstance(event.get("seconds"), int | float)]
    text = f"{counts[SAVED]:,} checkpoints were saved"
    if seconds:
        text += f", in {duration(statistics.median(seconds))} each (median, in the background where asynchronous)"
    text += f", and {counts[VALIDATION]:,} validations made."
    rows = [[moment(event[TIME]), escape(event_text(event))] for event in reversed(listed[-_MAX_EVENTS:])]
    hidden = len(listed) - len(rows)
    more = paragraph(f"{hidden:,} earlier events are in events.jsonl.", "note") if hidden else ""
    return paragraph(escape(text)) + table(["time", "event"], rows, kind="texts") + more


def wall_hours(history: RunHistory) -> FloatArray:
    """Return the hours from the first start to each step; the time of the steps alone if times are not recorded."""
    times_N = history.columns_N[TIME]
    if history.began_at_s is not None and np.isfinite(times_N).all():
        return np.asarray((times_N - history.began_at_s) / 3600)
    step_s_N = history.columns_N.get(STEP_TIME, np.empty(0))
    return np.asarray(np.cumsum(step_s_N) / 3600)
