"""States of runs as a table, as JSON and as a text file for Prometheus' node exporter."""

import json
import time
from collections.abc import Callable, Sequence
from typing import get_args

from megatron_bipe.monitor.status import GIB, RunStatus, State
from megatron_bipe.text_table import text_table

PREFIX = "megatron_bipe_run_"
_UNKNOWN = "-"
_COLUMNS = [
    "run",
    "state",
    "step",
    "of",
    "last line",
    "checkpoint",
    "loss",
    "tokens/s",
    "restarts",
    "ends (UTC)",
    "free GiB",
    "fit",
]
_GAUGES: dict[str, tuple[str, Callable[[RunStatus], float | None]]] = {
    "step": ("Updates done.", lambda run: run.step),
    "steps": ("Updates of the complete run.", lambda run: run.steps),
    "last_line_timestamp_seconds": ("Time of the last line in metrics.jsonl.", lambda run: run.line_at_s),
    "checkpoint_timestamp_seconds": ("Time of the newest checkpoint.", lambda run: run.checkpoint_at_s),
    "checkpoint_step": ("Step of the newest checkpoint.", lambda run: run.checkpoint_step),
    "loss_nats": ("Training loss of the last step in nats per token.", lambda run: run.loss),
    "tokens_per_second": ("Tokens per second over all ranks.", lambda run: run.tokens_per_s),
    "restarts_24h": ("Launches in the last 24 hours but for the first of the run.", lambda run: run.restarts),
    "finish_timestamp_seconds": ("Expected time of the last step.", lambda run: run.finish_at_s),
    "disk_free_bytes": ("Free space of the disk that has the run.", lambda run: run.free_bytes),
    "checkpoints_that_fit": ("Checkpoints that the disk has space for.", lambda run: run.checkpoints_that_fit),
    "needs_attention": ("1 if the run needs attention, else 0.", lambda run: float(bool(run.problems))),
}


def as_table(runs: Sequence[RunStatus], now_s: float) -> str:
    """Return a row for each run, and below it what needs attention."""
    table = text_table([_COLUMNS, *(_row(run, now_s) for run in runs)], head=1, left=(0, 1))
    return "\n".join([table, *(f"{run.run_dir}: {problem}" for run in runs for problem in run.problems)])


def _row(run: RunStatus, now_s: float) -> list[str]:
    ends = run.finish_at_s and time.strftime("%Y-%m-%d %H:%M", time.gmtime(run.finish_at_s))
    return [
        str(run.run_dir),
        run.state,
        _shown(run.step, ","),
        _shown(run.steps, ","),
        age_text(run.line_at_s, now_s),
        age_text(run.checkpoint_at_s, now_s),
        _shown(run.loss, ".4f"),
        _shown(run.tokens_per_s, ",.0f"),
        str(run.restarts),
        ends or _UNKNOWN,
        _shown(None if run.free_bytes is None else run.free_bytes / GIB, ",.1f"),
        _shown(run.checkpoints_that_fit, ","),
    ]


def _shown(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else format(value, form)


def age_text(at_s: float | None, now_s: float) -> str:
    """Return the time since `at_s` in its largest two units, such as `2h05m`; clocks of two machines may differ."""
    if at_s is None:
        return _UNKNOWN
    seconds = max(0, int(now_s - at_s))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{seconds % 60:02}s" if minutes else f"{seconds}s"


def as_json(runs: Sequence[RunStatus]) -> str:
    """Return the runs as a JSON list."""
    plain = [run._asdict() | {"run_dir": str(run.run_dir)} for run in runs]
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)


def as_prometheus(runs: Sequence[RunStatus]) -> str:
    """Return the runs in Prometheus' text format, all samples of a metric together; unknown values have no sample.

    Source: https://prometheus.io/docs/instrumenting/exposition_formats
    """
    lines = []
    for name, (meaning, value_of) in _GAUGES.items():
        lines += _head(name, meaning)
        for run in runs:
            if (value := value_of(run)) is not None:
                lines.append(f"{PREFIX}{name}{_labels(run=str(run.run_dir))} {float(value)!r}")
    lines += _head("state", "1 for the state of the run, 0 for all others.")
    for run in runs:
        for state in get_args(State):
            labels = _labels(run=str(run.run_dir), state=state)
            lines.append(f"{PREFIX}state{labels} {int(state == run.state)}")
    return "\n".join(lines) + "\n"


def _head(name: str, meaning: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {meaning}", f"# TYPE {PREFIX}{name} gauge"]


def _labels(**labels: str) -> str:
    return "{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items()) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
