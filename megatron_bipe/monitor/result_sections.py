"""Results on a run's page: validation by set, length and position, and the evaluations of its checkpoints."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from megatron_bipe.eval.page import details, table
from megatron_bipe.monitor.history import RunHistory
from megatron_bipe.monitor.svg_chart import Mark, Plot, Series, draw, short
from megatron_bipe.train.metrics_file import VALID_LOSS

_MAX_CURVES = 5
_NATS, _BY_POSITION = "nats", "nats_by_position"


class ValidCurve(NamedTuple):
    """Validation losses of a set at a sequence length."""

    name: str
    length_tokens: int
    steps: list[int]
    nats: list[float]

    @property
    def label(self) -> str:
        return f"{self.name}, {self.length_tokens:,} tokens"


def valid_curves(history: RunHistory) -> list[ValidCurve]:
    """Return the validation losses by set and length, in the order of the configuration; or the one of older runs."""
    found: dict[tuple[str, int], ValidCurve] = {}
    for line in history.validations:
        for name, length, value, nats in _valid_values(line.values):
            if value == _NATS and isinstance(nats, int | float):
                curve = found.setdefault((name, length), ValidCurve(name, length, [], []))
                curve.steps.append(line.step)
                curve.nats.append(float(nats))
    if not found:
        length = history.config.train.seq_len_tokens
        for line in history.validations:
            if isinstance(line.values.get(VALID_LOSS), int | float):
                curve = found.setdefault(("valid", length), ValidCurve("valid", length, [], []))
                curve.steps.append(line.step)
                curve.nats.append(float(line.values[VALID_LOSS]))
    return list(found.values())


def main_curve(history: RunHistory) -> ValidCurve | None:
    """Return the losses of the first set at the training length, or at its first length; None without validations."""
    curves = valid_curves(history)
    trained = (curve for curve in curves if curve.length_tokens == history.config.train.seq_len_tokens)
    return next(trained, curves[0] if curves else None)


def _valid_values(values: Mapping[str, Any]) -> Iterable[tuple[str, int, str, Any]]:
    """Yield (set, length, kind of value, value) of the keys that `valid_key` makes."""
    for key, value in values.items():
        parts = key.split("/")
        if len(parts) == 4 and parts[0] == "valid" and parts[2].isdigit():
            yield parts[1], int(parts[2]), parts[3], value


def validation_section(history: RunHistory, marks: Sequence[Mark] = ()) -> str:
    """Return validation losses by step, by sequence length and by position; "" without validations."""
    curves = valid_curves(history)
    if not curves:
        return ""
    parts: list[str] = []
    for name in dict.fromkeys(curve.name for curve in curves):
        own = [curve for curve in curves if curve.name == name]
        series = [
            Series(
                f"{curve.length_tokens:,} tokens",
                np.array(curve.steps, float),
                np.array(curve.nats),
                style,
                "line",
                True,
            )
            for style, curve in enumerate(own)
        ]
        parts.append(draw(Plot(series, "step", f"{name}: validation loss, nats per token", marks)))
        parts += _extrapolation(name, own)
        parts += _by_position(history, name)
    rows = [
        [escape(curve.label), f"{curve.steps[-1]:,}", f"{curve.nats[-1]:.4f}", f"{min(curve.nats):.4f}",
         short(math.exp(min(curve.nats[-1], 700)))]
        for curve in curves
    ]  # fmt: skip
    header = ["set and length", "last step", "loss, nats", "lowest", "perplexity"]
    return "".join(parts) + details("The last numbers", table(header, rows))


def _extrapolation(name: str, curves: Sequence[ValidCurve]) -> list[str]:
    """Return the loss against the sequence length at several steps, if the set has several lengths."""
    if len(curves) < 2:
        return []
    by_length = {curve.length_tokens: dict(zip(curve.steps, curve.nats, strict=True)) for curve in curves}
    steps = _spread(sorted(set.intersection(*(set(values) for values in by_length.values()))))
    lengths = np.array(sorted(by_length), float)
    series = [
        Series(
            f"step {step:,}",
            lengths,
            np.array([by_length[int(length)][step] for length in lengths]),
            style,
            "line",
            True,
        )
        for style, step in enumerate(steps)
    ]
    label = f"{name}: validation loss by sequence length, nats per token"
    return [draw(Plot(series, "sequence length, tokens", label, log_x=True))]


def _by_position(history: RunHistory, name: str) -> list[str]:
    """Return the loss by position in the longest sequence at several steps."""
    lines: dict[int, dict[int, list[float]]] = {}
    for line in history.validations:
        for set_name, length, value, losses in _valid_values(line.values):
            if set_name == name and value == _BY_POSITION and isinstance(losses, list) and losses:
                lines.setdefault(length, {})[line.step] = [math.nan if loss is None else loss for loss in losses]
    if not lines:
        return []
    length = max(lines)
    series = []
    for style, step in enumerate(_spread(sorted(lines[length]))):
        losses = lines[length][step]
        middles = (np.arange(len(losses)) + 0.5) * length / len(losses)
        series.append(Series(f"step {step:,}", middles, np.array(losses, float), style))
    label = f"{name}: validation loss by position in sequences of {length:,} tokens, nats per token"
    return [draw(Plot(series, "position, tokens", label))]


def _spread(steps: Sequence[int]) -> list[int]:
    """Return at most `_MAX_CURVES` of the steps at even distances, up to the last one."""
    count = min(len(steps), _MAX_CURVES)
    picked = (np.linspace(0, len(steps), count + 1)[1:] - 1).round().astype(int)
    return [steps[index] for index in dict.fromkeys(picked.tolist())]


def evaluations_section(history: RunHistory) -> str:
    """Return the numbers that `tools/evaluate.py follow` has appended, by kind and step; "" if there are none."""
    by_kind: dict[str, dict[int, dict[str, Any]]] = {}
    for line in history.evaluations:
        if isinstance(line.get("values"), dict) and isinstance(line["step"], int):
            by_kind.setdefault(str(line.get("kind", "evaluation")), {})[line["step"]] = dict(_flat(line["values"]))
    return "".join(_evaluation(kind, by_step) for kind, by_step in by_kind.items())


def _evaluation(kind: str, by_step: Mapping[int, Mapping[str, Any]]) -> str:
    steps = sorted(by_step)
    names = list(dict.fromkeys(name for step in steps for name in by_step[step]))
    numbers = [name for name in names if any(isinstance(by_step[step].get(name), int | float) for step in steps)]
    series = []
    for style, name in enumerate(numbers[:_MAX_CURVES]):
        values = np.array([_number(by_step[step].get(name)) for step in steps])
        series.append(Series(name, np.array(steps, float), values, style, has_dots=True))
    shown = steps[-6:]
    rows = [[escape(name), *(_cell(by_step[step].get(name)) for step in shown)] for name in numbers]
    texts = [
        [f"step {step:,}, {escape(name)}", escape(str(by_step[step][name])[:2000])]
        for step in shown
        for name in names
        if name not in numbers and name in by_step[step]
    ]
    return (
        f"<h3>{escape(kind)}</h3>\n"
        + (draw(Plot(series, "step", kind)) if len(steps) > 1 and series else "")
        + (table(["", *(f"step {step:,}" for step in shown)], rows) if rows else "")
        + (details("Texts", table(["", ""], texts, kind="texts")) if texts else "")
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _cell(value: Any) -> str:
    return short(value) if isinstance(value, int | float) and math.isfinite(value) else escape(str(value or ""))
