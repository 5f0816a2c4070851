"""The present state of a run, from one look at its folder, in which nothing is written.

Only the ends of long files are read. The folder may be read-only, on another machine, or half written; what cannot be
known is None.
"""

import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_bipe.checkpoint.find import Checkpoint, newest_first
from megatron_bipe.config import RunConfig, load_run_config
from megatron_bipe.errors import BipeError, CheckpointError
from megatron_bipe.io import LOCK_NAME, lock_holder, lock_host
from megatron_bipe.run_files import (
    DONE,
    EVENTS,
    FAILED,
    LOCK_FOLDER,
    METRICS,
    START,
    STOP,
    TIME,
    last_launch_event,
    read_events,
    read_last_lines,
)
from megatron_bipe.train.metrics_file import SAVED, STEP_TIME
from megatron_bipe.train.supervise import ON_FAILURE_LIMIT_S

State = Literal["not started", "starting", "training", "stalled", "done", "stopped", "waiting", "failed", "killed"]
ATTENTION: dict[State, str] = {
    "stalled": "the launch makes no progress",
    "failed": "the last launch failed, and none follows",
    "killed": "the last launch ended without a record of it",
}
LOSS, RATE = "loss/train_nats", "rate/tokens_per_s"
DAY_S, GIB = 86_400.0, 2**30
PROGRESS_LINES = 3  # of training, which a launch that makes progress writes in the time after which it is stalled
LAUNCH_S = ON_FAILURE_LIMIT_S + 120.0  # of a supervisor besides its wait, until the next launch has locked the folder


class Limits(NamedTuple):
    """Limits beyond which a run needs attention."""

    stalled_after_s: float | None = None
    """Age of the last sign of progress; None: parallel.timeout_s, or the time of `PROGRESS_LINES` if that is longer."""
    least_free_gib: float | None = None
    """Free disk space; None: that of the next checkpoint and checkpoint.min_free_gib."""


class RunStatus(NamedTuple):
    """State of a run; times are in seconds since 1970."""

    run_dir: Path
    state: State
    step: int | None
    steps: int | None
    """Last step of the run."""
    line_at_s: float | None
    """Time of the last line in metrics.jsonl."""
    checkpoint_step: int | None
    checkpoint_at_s: float | None
    loss: float | None
    """Training loss of the last step in nats per token; None: not finite, or unknown."""
    tokens_per_s: float | None
    restarts: int
    """Launches in the last 24 hours but for the first one of the run."""
    finish_at_s: float | None
    """Expected end, at the pace of the present launch with its validations and checkpoints."""
    free_bytes: int | None
    checkpoints_that_fit: int | None
    """Checkpoints that the disk has space for."""
    problems: tuple[str, ...]
    """Reasons why the run needs attention."""


class _Folder(NamedTuple):
    """What a run folder says."""

    run_dir: Path
    config: RunConfig | None
    lines: list[dict[str, Any]]
    """Lines of the last steps."""
    events: list[dict[str, Any]]
    checkpoint: Checkpoint | None

    @property
    def last_line(self) -> Mapping[str, Any]:
        return self.lines[-1] if self.lines else {}

    @property
    def line_at_s(self) -> float | None:
        """Time of the last line; that of the file for lines of earlier versions, which have none."""
        return _number(self.last_line, TIME) or _changed_at_s(self.run_dir / METRICS)

    @property
    def launch(self) -> Mapping[str, Any]:
        """Last event that begins or ends a launch; empty if there is none."""
        return last_launch_event(self.events)

    @property
    def saved(self) -> Mapping[str, Any]:
        """Event of the newest checkpoint; empty if there is none."""
        step = self.checkpoint.step if self.checkpoint else -1
        saves = (event for event in reversed(self.events) if event["event"] == SAVED)
        return next((event for event in saves if event.get("step") == step), {})

    @property
    def checkpoint_at_s(self) -> float | None:
        if self.checkpoint is None:
            return None
        return _number(self.saved, TIME) or _changed_at_s(self.checkpoint.folder)

    @property
    def step_s(self) -> float | None:
        """Seconds per step in the present launch, with validations and checkpoints."""
        began_s = _number(self.launch, TIME) or 0.0
        points = [(_number(line, "step"), _number(line, TIME)) for line in self.lines]
        known = [(step, at_s) for step, at_s in points if step is not None and at_s is not None and at_s >= began_s]
        if known and known[-1][0] > known[0][0] and known[-1][1] > known[0][1]:
            return (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0])
        return _number(self.last_line, STEP_TIME)


def read_status(run_dir: Path, limits: Limits, now_s: float) -> RunStatus:
    """Return the state of a run.

    Args:
        run_dir: folder of the run.
        limits: limits beyond which it needs attention.
        now_s: the present time, in seconds since 1970.

    Raises:
        CheckpointError: the folder does not exist, or has none of a run's files.
    """
    folder = _read(run_dir)
    state = _state(folder, limits, now_s)
    recorded = [_number(folder.last_line, "step"), _number(folder.launch, "step")]
    step = next((number for number in recorded if number is not None), folder.checkpoint and folder.checkpoint.step)
    steps = folder.config.train.steps if folder.config else None
    finish_at_s = None
    if state == "training" and steps and step is not None and folder.step_s and folder.line_at_s:
        finish_at_s = folder.line_at_s + max(0.0, steps - step) * folder.step_s
    free_bytes, next_bytes, fit = _disk(folder)
    problems = [ATTENTION[state]] if state in ATTENTION else []
    least_bytes = next_bytes if limits.least_free_gib is None else limits.least_free_gib * GIB
    if state != "done" and free_bytes is not None and free_bytes < least_bytes:
        problems.append(f"{free_bytes / GIB:.2f} GiB of the disk are free; {least_bytes / GIB:.2f} GiB are needed")
    return RunStatus(
        run_dir=run_dir,
        state=state,
        step=None if step is None else int(step),
        steps=steps,
        line_at_s=folder.line_at_s,
        checkpoint_step=folder.checkpoint.step if folder.checkpoint else None,
        checkpoint_at_s=folder.checkpoint_at_s,
        loss=_number(folder.last_line, LOSS),
        tokens_per_s=_number(folder.last_line, RATE),
        restarts=_restarts(folder.events, now_s),
        finish_at_s=finish_at_s,
        free_bytes=free_bytes,
        checkpoints_that_fit=fit,
        problems=tuple(problems),
    )


def _read(run_dir: Path) -> _Folder:
    if not any((run_dir / name).is_file() for name in ("config.yaml", EVENTS, METRICS)):
        seen = f"it has neither config.yaml nor {EVENTS}" if run_dir.is_dir() else "it does not exist"
        raise CheckpointError(
            f"this is not the folder of a run: {seen}", remedy="Name the run_dir of a run", location=run_dir
        )
    try:
        config = load_run_config(run_dir / "config.yaml")
    except (BipeError, OSError):  # it is being written, or damaged; the rest is shown
        config = None
    checkpoints = newest_first(run_dir)
    lines = read_last_lines(run_dir / METRICS, {"step", LOSS})
    return _Folder(run_dir, config, lines, read_events(run_dir), checkpoints[0] if checkpoints else None)


def _state(folder: _Folder, limits: Limits, now_s: float) -> State:
    last, lock = folder.launch, folder.run_dir / LOCK_FOLDER / LOCK_NAME
    signs = [
        folder.line_at_s,
        folder.checkpoint_at_s,
        _changed_at_s(lock),
        *(_number(e, TIME) for e in folder.events[-1:]),
    ]
    age_s = now_s - max((at_s for at_s in signs if at_s is not None), default=0.0)
    stalled_after_s = limits.stalled_after_s or _stalled_after_s(folder)
    if _is_running(lock.parent, age_s < stalled_after_s):
        if age_s >= stalled_after_s:
            return "stalled"
        has_begun = last.get("event") == START and (folder.line_at_s or 0.0) >= last[TIME]
        return "training" if has_begun else "starting"
    if last.get("event") == FAILED:
        wait_s = _number(last, "wait_s")
        return "failed" if wait_s is None or now_s > last[TIME] + wait_s + LAUNCH_S else "waiting"
    ends: dict[Any, State] = {DONE: "done", STOP: "stopped", START: "killed"}
    return ends.get(last.get("event"), "not started")


def _is_running(folder: Path, is_recent: bool) -> bool:
    """Return True if a launch holds the lock of a run.

    Of a launch on another host, a free lock proves nothing where the file system does not share locks or is read-only
    here. Then it runs if there are recent signs of progress.
    """
    lock = folder / LOCK_NAME
    if lock_holder(folder):
        return True
    if not lock.is_file():
        return False
    is_certain = lock_host(folder) == socket.gethostname() and os.access(lock, os.W_OK)
    return is_recent and not is_certain


def _stalled_after_s(folder: _Folder) -> float:
    config = folder.config or RunConfig()
    return max(config.parallel.timeout_s, PROGRESS_LINES * config.train.log_every * (folder.step_s or 0.0))


def _restarts(events: Sequence[Mapping[str, Any]], now_s: float) -> int:
    starts = [event[TIME] for event in events if event["event"] == START]
    return sum(now_s - at_s < DAY_S for at_s in starts[1:])


def _disk(folder: _Folder) -> tuple[int | None, int, int | None]:
    """Return the free bytes of the disk, those that the next checkpoint needs, and how many checkpoints fit."""
    reserve = int(folder.config.checkpoint.min_free_gib * GIB) if folder.config else 0
    size = int(_number(folder.saved, "bytes") or 0)
    try:
        free_bytes = shutil.disk_usage(folder.run_dir).free
        if not size and folder.checkpoint:
            size = sum(file.stat().st_size for file in folder.checkpoint.folder.iterdir())
    except OSError:  # retention deletes the checkpoint, or the file server does not answer
        return None, 0, None
    return free_bytes, size + reserve, max(0, free_bytes - reserve) // size if size else None


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    return value if isinstance(value, int | float) else None


def _changed_at_s(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
