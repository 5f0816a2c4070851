"""Results on a run's page: validation by set, length and position, and the evaluations of its checkpoints."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from megatron_bipe.eval.page import details, table
from megatron_bipe.monitor.history import RunHistory
from megatron_bipe.monitor.svg_chart import NUM_STYLES, Mark, Plot, Series, draw, short
from megatron_bipe.run_files import TIME
from megatron_bipe.train.metrics_file import VALID_LOSS

_MAX_CURVES = 5  # of one set at several steps
_MAX_SHOWN, _MAX_CHARTS, _MAX_NAME = 6, 6, 60  # steps in a table, charts of a kind, characters of a name
# Keys of a line of evaluations.jsonl that are not what an evaluation is of; docs/run_folder.md lists all.
_NOT_FACTS = {TIME, "step", "fingerprint", "kind", "values"}
_SUBJECTS = ("data", "length_tokens", "task", "prompt")  # always part of a name
_NOT_DRAWN = ("perplexity", "bits_per_byte", "num_predictions")  # they follow from the nats per token
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


class _Evaluated(NamedTuple):
    """The results of one evaluation of several checkpoints."""

    facts: dict[str, Any]
    """What identifies it, such as its data, sequence length and options."""
    values: dict[int, dict[str, Any]]
    """Its results by step and metric."""


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
    """Return the results that `tools/evaluate.py follow` has appended, by kind and step; "" if there are none."""
    by_kind: dict[str, dict[str, _Evaluated]] = {}
    for line in history.evaluations:
        if isinstance(line.get("values"), dict) and isinstance(line["step"], int):
            facts = {key: value for key, value in line.items() if key not in _NOT_FACTS}
            same_kind = by_kind.setdefault(str(line.get("kind", "evaluation")), {})
            evaluated = same_kind.setdefault(json.dumps(facts, sort_keys=True), _Evaluated(facts, {}))
            evaluated.values[line["step"]] = line["values"]  # of a repeated step, the last line is the present one
    return "".join(_evaluations(kind, list(same_kind.values())) for kind, same_kind in by_kind.items())


def _evaluations(kind: str, evaluated: Sequence[_Evaluated]) -> str:
    """Return charts of the metrics, a table of the last steps, and texts."""
    by_step: dict[tuple[str, str], dict[int, Any]] = {}  # by name of the evaluation and metric
    for name, each in zip(_names([each.facts for each in evaluated]), evaluated, strict=True):
        for step, values in each.values.items():
            for metric, value in values.items():
                by_step.setdefault((name, metric), {})[step] = value
    numbers = {key: found for key, found in by_step.items() if not any(map(_is_text, found.values()))}
    steps = sorted({step for found in by_step.values() for step in found})
    shown = steps[-_MAX_SHOWN:]
    rows = [[escape(_row_name(*key)), *(_cell(found.get(step)) for step in shown)] for key, found in numbers.items()]
    texts = [
        [f"step {step:,}, {escape(name)}", escape(str(found[step])[:2000])]
        for step in shown
        for (name, metric), found in by_step.items()
        if (name, metric) not in numbers and step in found
    ]
    return (
        f"<h3>{escape(kind)}</h3>\n"
        + _metric_charts(kind, numbers)
        + (table(["", *(f"step {step:,}" for step in shown)], rows) if rows else "")
        + (details("Texts", table(["", ""], texts, kind="texts")) if texts else "")
    )


def _metric_charts(kind: str, numbers: Mapping[tuple[str, str], Mapping[int, Any]]) -> str:
    """Return a chart of each metric that does not follow from another one, with a curve for each evaluation."""
    metrics: dict[str, list[Series]] = {}
    for (name, metric), found in numbers.items():
        task, _, quantity = metric.rpartition("/")
        if len(found) > 1 and quantity not in _NOT_DRAWN:
            series = metrics.setdefault(quantity, [])
            values = np.array([_number(found[step]) for step in sorted(found)])
            shown = ", ".join(part for part in (name, task) if part)
            series.append(Series(shown, np.array(sorted(found), float), values, len(series), has_dots=True))
    drawn = [(metric, series) for metric, series in metrics.items() if not metric.endswith("_stderr")][:_MAX_CHARTS]
    return "".join(draw(Plot(series[:NUM_STYLES], "step", f"{kind}: {metric}")) for metric, series in drawn)


def _names(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for each evaluation of a kind: what it is of, and the options in which it differs from others."""
    names = []
    for each in facts:
        same = [other for other in facts if all(other.get(key) == each.get(key) for key in _SUBJECTS)]
        differing = [key for key in each if any(other.get(key) != each[key] for other in same)]
        names.append(", ".join(_fact(key, each[key]) for key in each if key in _SUBJECTS or key in differing))
    return names


def _fact(key: str, value: Any) -> str:
    if key == "length_tokens" and isinstance(value, int):
        return f"{value:,} tokens"
    text = str(value) if key in _SUBJECTS else f"{key} {value}"
    return text if len(text) <= _MAX_NAME else f"{text[:_MAX_NAME]}..."


def _row_name(name: str, metric: str) -> str:
    return f"{name}: {metric}" if name else metric


def _is_text(value: Any) -> bool:
    return value is not None and not isinstance(value, int | float)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _cell(value: Any) -> str:
    return short(value) if isinstance(value, int | float) and math.isfinite(value) else escape(str(value or ""))
