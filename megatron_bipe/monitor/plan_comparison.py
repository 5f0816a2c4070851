"""What was planned for a run next to what its folder records: time of a step, speed, memory, checkpoints.

The plan is that of the run's own configuration and last layout on a GPU of the given kind, by the same estimates as
before the start. A ratio is measured / planned.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from megatron_bipe.checkpoint.find import list_steps, newest_first
from megatron_bipe.checkpoint.manifest import load_index
from megatron_bipe.config import engine_config
from megatron_bipe.errors import CheckpointError
from megatron_bipe.estimate.layouts import GIB
from megatron_bipe.estimate.memory import STATE_BYTES, outside_bytes, stage_memories
from megatron_bipe.estimate.step_time import predict_step, unpredictable
from megatron_bipe.model import count_parameters, train_flops_per_token
from megatron_bipe.monitor.history import RunHistory
from megatron_bipe.runtime.gpus import Gpu
from megatron_bipe.text_table import text_table
from megatron_bipe.train.metrics_file import SAVED, STEP_TIME

MFU, PEAK_MEMORY, RATE = "util/mfu", "mem/peak_gib", "rate/tokens_per_s"


class Comparison(NamedTuple):
    """A figure as planned and as measured; None: not known."""

    figure: str
    planned: float | None
    measured: float | None

    @property
    def ratio(self) -> float | None:
        return self.measured / self.planned if self.planned and self.measured is not None else None


def saved_zero_stage(history: RunHistory) -> int | None:
    """Return the ZeRO stage of the launch that wrote the newest checkpoint; None: there is no checkpoint."""
    if not list_steps(history.run_dir):
        return None
    return load_index(newest_first(history.run_dir)[0].folder).layout["zero"]


def num_ranks_of(history: RunHistory) -> int:
    """Return the number of ranks of the last launch that began.

    Raises:
        CheckpointError: no launch or no step is recorded.
    """
    num_ranks = history.last_start.get("ranks")
    if not isinstance(num_ranks, int) or not history.num_steps:
        start = "a start" if history.last_start else "no start"
        raise CheckpointError(
            f"the run has {start} of {num_ranks or 'no'} ranks and {history.num_steps} recorded steps: nothing was "
            "measured",
            remedy="Compare a run that has trained",
            location=history.run_dir,
        )
    return num_ranks


def compare_with_plan(
    history: RunHistory, ds_values: dict[str, Any], gpu: Gpu, write_bytes_s: float
) -> list[Comparison]:
    """Return the figures of a run as planned and as measured.

    Args:
        history: the run.
        ds_values: content of its DeepSpeed JSON file.
        gpu: the GPU that the plan is for, with its machine and network.
        write_bytes_s: planned rate at which all ranks together write a checkpoint.

    Raises:
        CheckpointError: nothing was measured.
    """
    run, num_ranks = history.config, num_ranks_of(history)
    ds_config = engine_config(run, ds_values, num_ranks, history.run_dir)
    first = stage_memories(run, ds_config, num_ranks, on_gpu=True)[0]  # that of rank 0, whose memory is recorded
    step = None if unpredictable(run, ds_config) else predict_step(run, ds_config, num_ranks, gpu)
    num_bytes = sum(count_parameters(run.model)) * STATE_BYTES
    rate = _median(history, RATE)
    flops = train_flops_per_token(run.model, run.train.seq_len_tokens) / (num_ranks * gpu.bf16_flops)
    saved = [event for event in history.events if event["event"] == SAVED]
    return [
        Comparison("s per step", step and step.total_s, _median(history, STEP_TIME)),
        Comparison("tokens/s", step and step.tokens_per_second, rate),
        Comparison("MFU", step and step.mfu, None if rate is None else rate * flops),
        Comparison(
            "peak GiB, allocated",
            (first.device - outside_bytes(first, run, num_ranks)) / GIB,
            _reduced(history, PEAK_MEMORY, np.max),
        ),
        Comparison("checkpoint, GB", num_bytes / 1e9, _event_median(saved, "bytes", 1e-9)),
        Comparison("checkpoint, s", num_bytes / write_bytes_s, _event_median(saved, "seconds")),
    ]


def comparison_text(rows: list[Comparison]) -> str:
    cells = [(row.figure, *map(_number, (row.planned, row.measured, row.ratio))) for row in rows]
    return text_table([("", "planned", "measured", "ratio"), *cells]) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _median(history: RunHistory, key: str) -> float | None:
    return _reduced(history, key, np.median)


def _reduced(history: RunHistory, key: str, reduce: Callable[..., Any]) -> float | None:
    values = history.columns_N.get(key)
    finite = values[np.isfinite(values)] if values is not None else np.zeros(0)
    return float(reduce(finite)) if finite.size else None


def _event_median(events: list[dict[str, Any]], key: str, unit: float = 1.0) -> float | None:
    values = [event[key] * unit for event in events if isinstance(event.get(key), int | float)]
    return float(np.median(values)) if values else None
