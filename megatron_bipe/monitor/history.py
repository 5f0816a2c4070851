"""A run folder read into memory: configuration, metrics, events and evaluations.

Only files are read, so a run that is training, was killed, or is half written can be read on any machine. Lines that
are truncated or damaged are skipped.

N recorded steps
"""

import math
from collections.abc import Mapping
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_bipe.config import RunConfig, load_run_config
from megatron_bipe.errors import CheckpointError
from megatron_bipe.run_files import (
    EVALUATIONS,
    METRICS,
    START,
    TIME,
    first_start_s,
    parse_line,
    read_events,
    read_lines,
)
from megatron_bipe.train.metrics_file import STEP_TIME

FloatArray = npt.NDArray[np.float64]
_LINES_AT_ONCE = 20_000


class Validation(NamedTuple):
    """Validation losses after a step."""

    step: int
    time_s: float  # since 1970
    values: dict[str, Any]
    """Values of the line by key; `train.metrics_file.valid_key` names them."""


class RunHistory(NamedTuple):
    """What a run folder records."""

    run_dir: Path
    config: RunConfig
    columns_N: dict[str, FloatArray]
    """Values of the training steps by key, such as `step`, `time` and `loss/train_nats`; NaN where a line has none."""
    validations: list[Validation]
    events: list[dict[str, Any]]
    """Lines of events.jsonl, in order."""
    evaluations: list[dict[str, Any]]
    """Lines of evaluations.jsonl, in order."""

    @property
    def num_steps(self) -> int:
        """Number of the last recorded step; 0 before the first."""
        steps_N = self.columns_N["step"]
        return int(steps_N[-1]) if steps_N.size else 0

    @property
    def last_start(self) -> dict[str, Any]:
        """Event of the last launch that began; empty if there is none."""
        return next((event for event in reversed(self.events) if event["event"] == START), {})

    @property
    def ds_settings(self) -> dict[str, Any] | None:
        """Content of the DeepSpeed file of the last launch that began; None: not recorded, as in earlier versions."""
        recorded = self.last_start.get("deepspeed")
        settings = recorded.get("settings") if isinstance(recorded, dict) else None
        return settings if isinstance(settings, dict) else None

    @property
    def began_at_s(self) -> float | None:
        """Time of the first start, since 1970; None if there is none."""
        return first_start_s(self.events)


def read_history(run_dir: Path) -> RunHistory:
    """Read a run folder.

    Raises:
        CheckpointError: the folder does not exist, or is not the folder of a run.
        ConfigError: its configuration is of another version or damaged.
    """
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise CheckpointError(
            f"{run_dir} {'has no config.yaml' if run_dir.is_dir() else 'does not exist'}, so it is not a run folder",
            remedy="Name the run_dir of a run that has started",
            location=run_dir,
        )
    columns_N, validations = _read_metrics(run_dir / METRICS)
    return RunHistory(
        run_dir,
        load_run_config(config),
        columns_N,
        validations,
        read_events(run_dir),
        read_lines(run_dir / EVALUATIONS, {"step"}),
    )


def _read_metrics(path: Path) -> tuple[dict[str, FloatArray], list[Validation]]:
    """Read metrics.jsonl in parts, since the objects of a long run's lines would need gigabytes."""
    parts: list[dict[str, FloatArray]] = []
    validations: list[Validation] = []
    with path.open("rb") if path.is_file() else BytesIO() as file:
        while raw := list(islice(file, _LINES_AT_ONCE)):
            lines = [values for values in map(parse_line, raw) if isinstance(values.get("step"), int)]
            parts.append(_columns([line for line in lines if STEP_TIME in line]))
            validations += [
                Validation(line["step"], _number(line, TIME), line) for line in lines if STEP_TIME not in line
            ]
    keys = dict.fromkeys(["step", TIME, *(key for part in parts for key in part)])
    missing = [np.full(part["step"].size, np.nan) for part in parts]
    columns_N = {
        key: np.concatenate([np.empty(0), *(part.get(key, no) for part, no in zip(parts, missing, strict=True))])
        for key in keys
    }
    return columns_N, validations


def _columns(lines: list[dict[str, Any]]) -> dict[str, FloatArray]:
    keys = dict.fromkeys(["step", TIME, *(key for line in lines for key in line)])
    return {key: np.array([_number(line, key) for line in lines], dtype=np.float64) for key in keys}


def _number(line: Mapping[str, Any], key: str) -> float:
    value = line.get(key)
    return value if isinstance(value, int | float) else math.nan
