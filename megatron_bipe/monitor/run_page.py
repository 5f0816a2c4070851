"""The page of one run, and the page that compares several, as HTML without scripts or other files."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np

from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.page import Section, facts, page, paragraph, table
from megatron_bipe.model import train_flops_per_token
from megatron_bipe.monitor.event_text import duration, moment
from megatron_bipe.monitor.history import FloatArray, RunHistory
from megatron_bipe.monitor.hours import Hours, account_hours
from megatron_bipe.monitor.provenance_section import provenance_section
from megatron_bipe.monitor.result_sections import evaluations_section, main_curve, validation_section
from megatron_bipe.monitor.run_sections import (
    event_marks,
    events_section,
    hours_section,
    speed_section,
    training_section,
    wall_hours,
)
from megatron_bipe.monitor.status import Limits, RunStatus, read_status
from megatron_bipe.monitor.svg_chart import NUM_STYLES, Plot, Series, draw, mean_by_column, short
from megatron_bipe.train.provenance import HIDDEN, SECRETS, flat_settings

_STYLE = "run_page.css"  # in this package
_SHAPES = ("line", "dotted")  # the second one when the colours are used up
_LOSS, _TOKENS = "loss/train_nats", "tokens"


def run_page(histories: Sequence[RunHistory], now_s: float) -> str:
    """Return the page of a run, or of several runs together.

    Args:
        histories: the runs; at least one.
        now_s: time of the page, since 1970.

    Raises:
        ConfigError: a run is given twice.
    """
    names = run_names([history.run_dir for history in histories])
    style = resources.files(__package__).joinpath(_STYLE).read_text(encoding="utf-8")
    if len(histories) > 1:
        title = f"{len(histories)} runs"
        return page(title, _lead_of_several(now_s), _several(histories, names, now_s), "megatron_bipe runs", style)
    [history] = histories
    hours = account_hours(history)
    sections = (
        Section("Where the hours went", hours_section(history, hours)),
        Section("Training", training_section(history)),
        Section("Validation", validation_section(history, event_marks(history))),
        Section("Evaluations", evaluations_section(history)),
        Section("Speed and memory", speed_section(history)),
        Section("Events", events_section(history)),
        Section("Provenance", provenance_section(history)),
    )
    shown = [section for section in sections if section.html]
    return page(names[0], _lead(history, hours, now_s), shown, "megatron_bipe run", style)


def run_names(run_dirs: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that distinguish them.

    Raises:
        ConfigError: a folder is given twice.
    """
    paths = [path.resolve() for path in run_dirs]
    repeated = [path for path, count in Counter(paths).items() if count > 1]
    if repeated:
        raise ConfigError(f"{repeated[0]} is given twice", remedy="Name each run once", location=repeated[0])
    num_parts = 1
    while True:
        names = [str(Path(*path.parts[-num_parts:])) for path in paths]
        if len(set(names)) == len(names):
            return names
        num_parts += 1


def _lead(history: RunHistory, hours: Hours, now_s: float) -> str:
    status = read_status(history.run_dir, Limits(), now_s)
    train = history.config.train
    loss_N = history.columns_N.get(_LOSS, np.empty(0))
    tokens = history.num_steps * train.global_batch * train.seq_len_tokens
    curve = main_curve(history)
    tiles = [(f"{history.num_steps:,}", f"of {train.steps:,} steps"), (short(tokens), "tokens")]
    tiles += [(f"{np.nanmean(loss_N[-train.log_every :]):.4g}", "training loss, nats")] if _has_value(loss_N) else []
    tiles += [(f"{curve.nats[-1]:.4g}", f"validation loss, {curve.label}")] if curve else []
    tiles += [(f"{hours.goodput:.1%}", f"goodput in {duration(hours.wall_s)}")] if hours.steps else []
    if status.finish_at_s is not None:
        left = duration(max(status.finish_at_s - now_s, 0))
        tiles.append((left, f"left at this rate, until {moment(status.finish_at_s)}"))
    model = history.config.model
    about = f"{model.encoding}, {model.num_layers} layers of width {model.hidden_size}, in {history.run_dir}"
    return paragraph(escape(about), "lead") + paragraph(_state_html(status, now_s)) + facts(tiles)


def _has_value(values_N: FloatArray) -> bool:
    return bool(np.isfinite(values_N[-10:]).any())


def _state_html(status: RunStatus, now_s: float) -> str:
    age_s = None if status.line_at_s is None else max(now_s - status.line_at_s, 0)
    age = "" if age_s is None else f", {duration(age_s)} after the last step was recorded"
    return f"{_state_label(status)} Seen at {moment(now_s)}{age}"


def _state_label(status: RunStatus) -> str:
    return f'<span class="state {status.state.replace(" ", "-")}">{status.state}</span>'


def _lead_of_several(now_s: float) -> str:
    return paragraph(escape(f"Compared at {moment(now_s)}."), "lead")


def _several(histories: Sequence[RunHistory], names: Sequence[str], now_s: float) -> list[Section]:
    rows, hour_rows = [], []
    for history, name in zip(histories, names, strict=True):
        hours, curve = account_hours(history), main_curve(history)
        status = read_status(history.run_dir, Limits(), now_s)
        loss = f"{curve.nats[-1]:.4f}" if curve else ""
        step = f"{history.num_steps:,} of {history.config.train.steps:,}"
        rows.append([escape(name), _state_label(status), step, loss])
        shares = (f"{seconds / hours.wall_s:.1%}" if hours.wall_s > 0 else "" for seconds in hours)
        hour_rows.append([escape(name), duration(hours.wall_s), *shares])
    return [
        Section("Runs", table(["run", "state", "step", "validation loss, nats"], rows)),
        Section("Training loss", _overlay(histories, names, _training_curve, "training loss, nats per token", "train")),
        Section(
            "Validation loss", _overlay(histories, names, _valid_curve, "validation loss, nats per token", "valid")
        ),
        Section("Differing settings", settings_table(histories, names)),
        Section("Where the hours went", table(["run", "time", *Hours._fields], hour_rows)),
    ]


def _overlay(
    histories: Sequence[RunHistory],
    names: Sequence[str],
    curve: Callable[[RunHistory, str], tuple[FloatArray, FloatArray]],
    label: str,
    key: str,
) -> str:
    """Return the curves of all runs against each axis; radio buttons choose the axis without a script."""
    views, buttons = "", ""
    for number, axis in enumerate(("step", "tokens", "FLOPs", "hours since the first start")):
        series = [
            Series(name, *curve(history, axis), style, _SHAPES[style // NUM_STYLES % 2], has_dots=key == "valid")
            for style, (history, name) in enumerate(zip(histories, names, strict=True))
        ]
        chart = draw(Plot(series, axis, label))
        if not chart:
            return paragraph("No run has recorded this yet.")
        checked = " checked" if number == 0 else ""
        name = escape(f"{key}-{number}")
        buttons += (
            f'<input type="radio" name="{key}" id="{name}"{checked}><label for="{name}">{axis.split()[0]}</label>\n'
        )
        views += f'<div class="view">\n{chart}</div>\n'
    return f'<div class="choose">\n{buttons}{views}</div>\n'


def _training_curve(history: RunHistory, axis: str) -> tuple[FloatArray, FloatArray]:
    x_N = _axis(history, axis)
    return mean_by_column(x_N, history.columns_N.get(_LOSS, np.full(x_N.size, math.nan)))


def _valid_curve(history: RunHistory, axis: str) -> tuple[FloatArray, FloatArray]:
    curve = main_curve(history)
    if curve is None:
        return np.empty(0), np.empty(0)
    steps = np.array(curve.steps, float)
    return np.interp(steps, history.columns_N["step"], _axis(history, axis), left=math.nan), np.array(curve.nats)


def _axis(history: RunHistory, axis: str) -> FloatArray:
    """Return the position of each step on an axis of the overlays."""
    train, steps_N = history.config.train, history.columns_N["step"]
    tokens_N = steps_N * train.global_batch * train.seq_len_tokens
    if axis == "step":
        return steps_N
    if axis == _TOKENS:
        return tokens_N
    if axis == "FLOPs":
        return tokens_N * train_flops_per_token(history.config.model, train.seq_len_tokens)
    return wall_hours(history)


def settings_table(histories: Sequence[RunHistory], names: Sequence[str]) -> str:
    """Return the settings in which runs differ; those that are secret only say that they do."""
    settings = [flat_settings(history.config.model_dump(mode="json")) for history in histories]
    keys = dict.fromkeys(key for each in settings for key in each if key != "run_dir")
    rows = [
        [
            f"<code>{escape(key)}</code>",
            *(escape(HIDDEN if key in SECRETS else str(each.get(key))) for each in settings),
        ]
        for key in keys
        if len({str(each.get(key)) for each in settings}) > 1
    ]
    if not rows:
        return paragraph("All settings are equal, except for the folder of the run.")
    return table(["setting", *map(escape, names)], rows, kind="texts")
