"""Losses and throughput of a training run, read from its metrics.jsonl. Torch-free."""

import json
import math
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from megatron_bipe.errors import DataError
from megatron_bipe.eval.line_chart import Line

METRICS_NAME = "metrics.jsonl"


class RunLosses(NamedTuple):
    """Metrics of a run's steps."""

    train: list[tuple[float, float]]
    """(tokens seen, training loss in nats), one point per step; NaN where the loss was not finite."""
    valid: list[tuple[float, float]]
    """(tokens seen, validation loss in nats)."""
    steps_s: list[float]

    @property
    def num_tokens(self) -> int:
        return int(self.train[-1][0])

    @property
    def step_s(self) -> float:
        """Median seconds per step."""
        return median(self.steps_s)

    @property
    def tokens_per_s(self) -> float:
        """Throughput over all steps, excluding validation and checkpointing."""
        return self.num_tokens / max(sum(self.steps_s), 1e-9)


def read_losses(run_dir: Path) -> RunLosses:
    """Read the metrics of a run.

    Raises:
        DataError: the file is missing, has a damaged line, or has no training step.
    """
    path = run_dir / METRICS_NAME
    losses = RunLosses([], [], [])
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(
            f"the metrics of the run cannot be read: {error.strerror}",
            remedy="Give the folder of a run that has started",
            location=path,
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            _append_line(losses, json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"line {number} is damaged: {line[:60]!r}", remedy="Train the run again", location=path
            ) from error
    if not losses.train:
        raise DataError("the file has no training step", remedy="Train the run again", location=path)
    return losses


def loss_lines(name: str, style: int, losses: RunLosses, max_points: int = 100) -> list[Line]:
    """Return chart lines: validation loss with the run's name, training loss as a line in the background.

    Args:
        name: name of the run.
        style: index of its colour.
        losses: metrics of the run.
        max_points: maximum points of the averaged training loss; without validations that line has the name.
    """
    averaged = average_steps(losses.train, max_points)
    if not losses.valid:
        return [Line(name, style, averaged)]
    return [Line(name, style, losses.valid), Line("", style, averaged)]


def average_steps(points: list[tuple[float, float]], max_points: int) -> list[tuple[float, float]]:
    """Average neighbouring points in equal groups, so that at most `max_points` remain."""
    size = math.ceil(len(points) / max_points)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _append_line(losses: RunLosses, values: dict[str, Any]) -> None:
    tokens = float(values["tokens"])
    if "loss/train_nats" in values:
        losses.train.append((tokens, _number(values["loss/train_nats"])))
        losses.steps_s.append(float(values["time/step_s"]))
    if "loss/valid_nats" in values:
        losses.valid.append((tokens, _number(values["loss/valid_nats"])))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
