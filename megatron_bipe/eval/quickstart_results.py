"""Results of a quickstart run: the files that it writes, and whether they show the paper's effect. Torch-free.

In small models the effect is that beyond the training length RoPE degrades and bilevel encodings do not. It shows if
RoPE's loss in nats per token rises by at least 3 times as much as BiPE-RoPE's at twice the training length and by at
least 1.25 times as much at four times, and if BiPE-ALiBi's rises at neither. These bounds were fixed before the
quickstart was tuned; they allow for small models, whose BiPE-RoPE holds to about twice the training length.
"""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from megatron_bipe.config import RunConfig, load_run_config
from megatron_bipe.data.dataset import TokenDataset, open_tokenizer
from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.run_files import METRICS

T = TypeVar("T", bound=BaseModel)
JUDGED_STRETCHES = (2, 4)  # judged lengths, in multiples of the training length
RISE_RATIOS = (3.0, 1.25)  # smallest ratio of RoPE's rise to BiPE-RoPE's at each of them
REMEDY = "Remove the output of that step and run tools/quickstart.py again; it repeats missing steps"


class Result(BaseModel):
    """Perplexity at one sequence length in evaluation/perplexity.json."""

    length_tokens: int
    perplexity: float | None
    """None: infinite."""


class Model(BaseModel):
    """A model in evaluation/perplexity.json."""

    name: str
    num_parameters: int
    train_len_tokens: int
    results: list[Result]
    encoding: str = ""
    """Determines the colour in charts."""

    @property
    def points(self) -> list[tuple[float, float]]:
        """(sequence length in tokens, perplexity)."""
        return [(r.length_tokens, math.inf if r.perplexity is None else r.perplexity) for r in self.results]


class Evaluation(BaseModel):
    """The fields of evaluation/perplexity.json that the page needs."""

    protocol_means: str
    models: list[Model]


class Times(BaseModel):
    """Content of logs/times.json."""

    steps_s: dict[str, float] = {}
    """Seconds by title of the step."""
    total_s: float = 0.0
    """Wall time of all steps; parallel steps count once."""


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


class Quickstart(NamedTuple):
    """Results of a quickstart run."""

    folder: Path
    evaluation: Evaluation
    runs: list[tuple[RunConfig, RunLosses]]
    """Configuration and losses of each evaluated model, in the order of the evaluation."""
    train: TokenDataset
    valid: TokenDataset
    tokenizer: Tokenizer
    generated: str
    times: Times
    """Empty if they were not recorded."""


def read_quickstart(folder: Path) -> Quickstart:
    """Read the results of a quickstart run.

    Raises:
        BipeError: a file is missing or damaged; the error names it.
    """
    path = folder / "evaluation" / "perplexity.json"
    evaluation = _read_json(path, Evaluation)
    if not evaluation.models or not all(model.results for model in evaluation.models):
        raise DataError("the evaluation has no results", remedy=REMEDY, location=path)
    runs = []
    for model in evaluation.models:
        run_dir = folder / "runs" / model.name
        runs.append((load_run_config(run_dir / "config.yaml"), read_losses(run_dir)))
    train, valid = TokenDataset(folder / "data" / "train"), TokenDataset(folder / "data" / "valid")
    times = folder / "logs" / "times.json"
    times_of_steps = _read_json(times, Times) if times.exists() else Times()
    generated = _read_bytes(folder / "generated.txt").decode(errors="replace")
    return Quickstart(folder, evaluation, runs, train, valid, open_tokenizer(valid), generated, times_of_steps)


def read_losses(run_dir: Path) -> RunLosses:
    """Read the metrics of a run.

    Raises:
        DataError: the file is missing, has a damaged line, or has no training step.
    """
    path = run_dir / METRICS
    losses = RunLosses([], [], [])
    for number, line in enumerate(_read_bytes(path).splitlines(), 1):
        try:
            _append_line(losses, json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"line {number} is damaged: {line[:60]!r}", remedy=REMEDY, location=path) from error
    if not losses.train:
        raise DataError("the file has no training step", remedy=REMEDY, location=path)
    return losses


def read_column(path: Path, column: str) -> dict[str, dict[int, float]]:
    """Return encoding -> length -> value of a column of the evaluation's CSV file."""
    result: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            result.setdefault(row["encoding"], {})[int(row["length_tokens"])] = float(row[column])
    return result


def average_steps(points: list[tuple[float, float]], max_points: int) -> list[tuple[float, float]]:
    """Average neighbouring points in equal groups, so that at most `max_points` remain."""
    size = math.ceil(len(points) / max_points)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _read_json(path: Path, kind: type[T]) -> T:
    try:
        return kind.model_validate_json(_read_bytes(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(map(str, first["loc"]))
        reason = f"{location}: {first['msg']}" if location else first["msg"]
        raise DataError(f"the file is damaged: {reason}", remedy=REMEDY, location=path) from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", remedy=REMEDY, location=path) from error


def _append_line(losses: RunLosses, values: dict[str, Any]) -> None:
    tokens = float(values["tokens"])
    if "loss/train_nats" in values:
        losses.train.append((tokens, _number(values["loss/train_nats"])))
        losses.steps_s.append(float(values["time/step_s"]))
    if "loss/valid_nats" in values:
        losses.valid.append((tokens, _number(values["loss/valid_nats"])))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


class ExtrapolationEffect(NamedTuple):
    """Changes of the losses from the training length to each of `JUDGED_STRETCHES`."""

    rises_nats: Mapping[str, tuple[float, float]]
    """By encoding: loss there minus the loss at the training length, in nats per token; negative if it fell."""

    @property
    def ratios(self) -> tuple[float, float]:
        """RoPE's rise over BiPE-RoPE's; infinite if only RoPE's rises, 0 if RoPE's does not."""
        pairs = zip(self.rises_nats["rope"], self.rises_nats["bipe_rope"], strict=True)
        twice, four_times = (0.0 if rope <= 0 else rope / bipe if bipe > 0 else math.inf for rope, bipe in pairs)
        return twice, four_times

    @property
    def rope_breaks(self) -> tuple[bool, bool]:
        """True where the ratio reaches its bound in `RISE_RATIOS`."""
        twice, four_times = (ratio >= least for ratio, least in zip(self.ratios, RISE_RATIOS, strict=True))
        return twice, four_times

    @property
    def alibi_holds(self) -> bool:
        """True if BiPE-ALiBi's loss rises at none of the lengths."""
        return all(rise <= 0 for rise in self.rises_nats["bipe_alibi"])

    @property
    def shows(self) -> bool:
        return all(self.rope_breaks) and self.alibi_holds


def extrapolation_effect(nats: Mapping[str, Mapping[int, float]], train_len_tokens: int) -> ExtrapolationEffect:
    """Compare losses at 2 and 4 times the training length with those at the training length.

    Args:
        nats: encoding -> sequence length in tokens -> loss in nats per token; `rope`, `bipe_rope` and `bipe_alibi`, at
            least at these three lengths.
        train_len_tokens: the training length.
    """
    rises = {}
    for encoding, by_length in nats.items():
        twice, four_times = (by_length[stretch * train_len_tokens] for stretch in JUDGED_STRETCHES)
        rises[encoding] = (twice - by_length[train_len_tokens], four_times - by_length[train_len_tokens])
    return ExtrapolationEffect(rises)


def verdict(nats: Mapping[str, Mapping[int, float]], train_len_tokens: int) -> str:
    """Describe how losses change beyond the training length, and whether this shows the paper's effect."""
    effect = extrapolation_effect(nats, train_len_tokens)
    lines = []
    for index, stretch in enumerate(JUDGED_STRETCHES):
        rises = {encoding: f"{rises[index]:+.3f}" for encoding, rises in effect.rises_nats.items()}
        lines.append(
            f"At {stretch * train_len_tokens} tokens, {stretch} times the training length, the loss has changed by "
            f"{rises['rope']} nats a token with RoPE, {rises['bipe_rope']} with BiPE-RoPE, "
            f"{rises['bipe_alibi']} with BiPE-ALiBi."
        )
    twice, four_times = RISE_RATIOS
    lines.append(
        "Beyond the training length RoPE gets worse and the bilevel encodings hold: the effect of the paper."
        if effect.shows
        else f"The effect of the paper does NOT show in this run: RoPE's rise should be {twice:g} and {four_times:g} "
        "times BiPE-RoPE's, and BiPE-ALiBi's loss should not rise."
    )
    return "\n".join(lines)
