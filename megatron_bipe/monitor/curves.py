"""Training and validation curves of runs; runs that differ only in their seed form one group.

N recorded steps · S steps of a curve · R runs of a group
"""

import difflib
import fnmatch
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.monitor.history import FloatArray, RunHistory, read_history
from megatron_bipe.run_files import TIME
from megatron_bipe.train.metrics_file import STEP_TIME, VALID_LOSS

XAxis = Literal["step", "tokens", "hours"]
X_AXES: tuple[XAxis, ...] = get_args(XAxis)
TRAIN_LOSS = "loss/train_nats"
MOST_POINTS = 2000  # of a curve: a picture shows no more, and a PDF with a million is slow
SMOOTH_SHARE = 200  # the default averages over 1/200 of the steps
_COUNTERS = ("step", "tokens", TIME)


class Curve(NamedTuple):
    """Values of one key."""

    points: list[tuple[float, float]]
    """(x, value), the mean over the runs."""
    band: list[tuple[float, float, float]]
    """(x, lowest, highest) over the runs; empty for one run."""


def read_runs(run_dirs: Sequence[Path]) -> list[RunHistory]:
    """Read run folders, each once.

    Raises:
        CheckpointError: a folder is not that of a run, or the run has not recorded a step.
        ConfigError: a configuration cannot be read.
    """
    histories = [read_history(run_dir) for run_dir in dict.fromkeys(path.resolve() for path in run_dirs)]
    for history in histories:
        if not history.num_steps:
            raise CheckpointError(
                "the run has not recorded a step",
                remedy="Wait for the first progress line, after step 1, or remove it from the command",
                location=history.run_dir,
            )
    return histories


def group_seeds(histories: Sequence[RunHistory]) -> list[list[RunHistory]]:
    """Return groups of runs whose configurations differ only in `train.seed`, in the order of their first runs."""
    groups: dict[str, list[RunHistory]] = {}
    for history in histories:
        groups.setdefault(_without_seed(history), []).append(history)
    result = []
    for group in groups.values():
        seeds = {history.config.train.seed for history in group}
        result += [group] if len(seeds) == len(group) else [[history] for history in group]
    return result


def _without_seed(history: RunHistory) -> str:
    """Return the settings that the runs of a group share."""
    config = history.config
    train = config.train.model_copy(update={"seed": 0})
    defaults = type(config)(run_dir=config.run_dir)
    same = {"run_dir": defaults.run_dir, "train": train, "tracking": defaults.tracking, "alerts": defaults.alerts}
    return repr(config.model_copy(update=same).model_dump(exclude={"run_dir"}))


def group_names(groups: Sequence[Sequence[RunHistory]]) -> list[str]:
    """Return names: the encodings if they distinguish several groups, else the parts of the paths that do."""
    encodings = [group[0].config.model.encoding for group in groups]
    if len(set(encodings)) == len(groups) > 1:
        return encodings
    paths = [Path(os.path.commonpath([history.run_dir for history in group])).parts for group in groups]
    if len(set(paths)) < len(groups):
        paths = [group[0].run_dir.parts for group in groups]
    if len(paths) == 1:
        return [paths[0][-1]]
    before = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))))
    rests = [path[before:] for path in paths]
    backwards = zip(*(reversed(rest) for rest in rests), strict=False)
    after = len(list(takewhile(lambda parts: len(set(parts)) == 1, backwards)))
    return ["/".join(rest[: len(rest) - after]) or path[-1] for rest, path in zip(rests, paths, strict=True)]


def select_keys(histories: Sequence[RunHistory], patterns: Sequence[str]) -> list[str]:
    """Return the keys to draw: those that the patterns match, or by default the losses.

    Raises:
        ConfigError: a pattern matches no key of any run; the message names the nearest key.
    """
    known = list(dict.fromkeys(key for history in histories for key in _keys(history)))
    if not patterns:
        valid = [VALID_LOSS] if VALID_LOSS in known else [key for key in known if fnmatch.fnmatch(key, "valid/*/nats")]
        return [key for key in (TRAIN_LOSS, *valid) if key in known]
    selected: list[str] = []
    for pattern in patterns:
        found = [key for key in known if fnmatch.fnmatchcase(key, pattern)]
        if not found:
            nearest = difflib.get_close_matches(pattern, known, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ConfigError(
                f"no run has the key {pattern!r}",
                remedy=f"{hint}The runs have {', '.join(known)}",
                location="--keys",
            )
        selected += found
    return list(dict.fromkeys(selected))


def is_validation(history: RunHistory, key: str) -> bool:
    """Return True if validations have the key, and the training steps do not."""
    return key not in history.columns_N


def draw_curve(group: Sequence[RunHistory], key: str, x: XAxis, smooth: int | None = None) -> Curve | None:
    """Return the curve of a key over the steps that all runs of a group have; None if a run lacks the key.

    Args:
        group: runs that differ in their seed.
        key: key of training steps or of validations.
        x: horizontal axis.
        smooth: steps over which values of training are averaged; None: 1/200 of the steps.
    """
    series = [_series(history, key, smooth_steps(group, smooth)) for history in group]
    steps_S = series[0][0]
    for steps, _ in series[1:]:
        steps_S = np.intersect1d(steps_S, steps)
    if not steps_S.size:
        return None
    thinned = np.unique(np.linspace(0, steps_S.size - 1, min(steps_S.size, MOST_POINTS)).round().astype(int))
    steps_S = steps_S[thinned]
    values_RS = np.array([values[np.searchsorted(steps, steps_S)] for steps, values in series])
    x_S = np.mean([_positions(history, steps_S, x) for history in group], axis=0).tolist()
    means_S, lows_S, highs_S = (f(values_RS, axis=0).tolist() for f in (np.mean, np.min, np.max))
    points = list(zip(x_S, means_S, strict=True))
    return Curve(points, list(zip(x_S, lows_S, highs_S, strict=True)) if len(group) > 1 else [])


def smooth_steps(group: Sequence[RunHistory], wanted: int | None) -> int:
    """Return the number of steps over which training values are averaged, at least so many that every step counts."""
    num_steps = max(history.columns_N["step"].size for history in group)
    return max(1, wanted or num_steps // SMOOTH_SHARE, -(-num_steps // MOST_POINTS))


def _keys(history: RunHistory) -> list[str]:
    """Return the keys with numbers."""
    lines = [key for line in history.validations for key, value in line.values.items() if _is_number(value)]
    return [key for key in dict.fromkeys([*history.columns_N, *lines]) if key not in _COUNTERS]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _series(history: RunHistory, key: str, smooth: int) -> tuple[FloatArray, FloatArray]:
    """Return the steps and values of a key, averaged if it is one of the training steps."""
    if not is_validation(history, key):
        return history.columns_N["step"], _average(history.columns_N[key], smooth)
    found = {line.step: line.values[key] for line in history.validations if _is_number(line.values.get(key))}
    steps = sorted(found)
    return np.array(steps, dtype=np.float64), np.array([found[step] for step in steps], dtype=np.float64)


def _average(values_N: FloatArray, width: int) -> FloatArray:
    """Return the mean of the finite values among `width` neighbours of each; NaN if there are none."""
    finite_N = np.isfinite(values_N)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite_N, values_N, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite_N)])
    index_N = np.arange(values_N.size)
    first_N = np.maximum(index_N - (width - 1) // 2, 0)
    last_N = np.minimum(index_N + width // 2 + 1, values_N.size)
    num_N = counts[last_N] - counts[first_N]
    return np.where(num_N > 0, (sums[last_N] - sums[first_N]) / np.maximum(num_N, 1), np.nan)


def _positions(history: RunHistory, steps_S: FloatArray, x: XAxis) -> FloatArray:
    """Return the horizontal positions of steps."""
    steps_N = history.columns_N["step"]
    if x == "step":
        return steps_S
    if x == "tokens":
        return np.interp(steps_S, steps_N, history.columns_N["tokens"])
    return np.interp(steps_S, steps_N, np.nancumsum(history.columns_N[STEP_TIME]) / 3600)
