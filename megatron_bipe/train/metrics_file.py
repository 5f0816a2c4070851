"""The two logs of a run, in JSON lines; docs/run_folder.md lists their keys.

    RUN/metrics.jsonl    one line for each step and each validation, in order, without duplicates
    RUN/events.jsonl     {"time": seconds since 1970, "event": "start" | "stop" | ..., and the fields of the event}

A run that resumes from a checkpoint repeats the steps after it, so opening metrics.jsonl truncates it at the
checkpoint; a kill comes either before or after this single system call. The lines of a checkpoint's steps are on disk
before the checkpoint is (`sync`), so none are missing.

Lines of events.jsonl are only appended. All starts of a run append to one file: its first line shows when the run
began, and its last line how it ended.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from megatron_bipe.io import fsync_path

_log = logging.getLogger(__name__)

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
LOCK_FOLDER = "running"  # in the run folder, too
START, STOP, DONE, FAILED = "start", "stop", "done", "failed"
SAVED, SAVE_FAILED, FELL_BACK, VALIDATION = "saved", "save failed", "fell back", "validation"
TIME = "time"  # when the line was written, seconds since 1970, as events.jsonl has it
STEP_TIME, VALID_LOSS = "time/step_s", "loss/valid_nats"


class Kept(NamedTuple):
    """The part of a file that is kept."""

    size_bytes: int
    step_time_s: float  # of all steps in total
    last_lines: list[dict[str, Any]]  # of the last step


class MetricsFile:
    """The metrics file of a run, open for appending.

    Args:
        path: path of the file.
        last_step: later lines are dropped, as are truncated ones.
        valid_owed: True if the validation of that step is pending, so that its line is dropped, too.
    """

    def __init__(self, path: Path, last_step: int, valid_owed: bool = False) -> None:
        self._file = path.open("ab")
        kept = scan(path, last_step, valid_owed)
        self._file.truncate(kept.size_bytes)
        self.step_time_s = kept.step_time_s
        self.last_lines = kept.last_lines

    def add(self, values: Mapping[str, Any]) -> None:
        """Append a line; numbers that are not finite become null, as JSON has none."""
        self._file.write(orjson.dumps(values) + b"\n")
        self._file.flush()
        self.step_time_s += values.get(STEP_TIME, 0.0)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def scan(path: Path, last_step: int, valid_owed: bool = False) -> Kept:
    """Return the part of a file to keep: up to the last complete line of `last_step`; arguments as in `MetricsFile`."""
    read_bytes, size_bytes, step_time_s, last_lines = 0, 0, 0.0, list[dict[str, Any]]()
    with path.open("rb") as file:
        for line in file:
            read_bytes += len(line)
            values = _parsed(line)
            if "step" not in values:  # damaged; kept if good lines follow
                continue
            step = values["step"]
            if step > last_step or (valid_owed and step == last_step and VALID_LOSS in values):
                break
            if read_bytes - len(line) > size_bytes:
                _log.warning("%s has damaged lines before step %s; they are kept unchanged", path, step)
            size_bytes = read_bytes
            step_time_s += values.get(STEP_TIME, 0.0)
            last_lines = [*(line for line in last_lines if line["step"] == step), values]
    return Kept(size_bytes, step_time_s, last_lines)


def last_step_text(run_dir: Path) -> str:
    """Return the last step in the metrics of a run as text; "" if there is none."""
    try:
        last_lines = scan(run_dir / METRICS, sys.maxsize).last_lines
    except OSError:
        return ""
    return f"last step {last_lines[0]['step']}" if last_lines else ""


class Events:
    """Writer of the event log; only the main rank writes.

    Args:
        run_dir: folder of the run.
        is_main: True on the main rank.
    """

    def __init__(self, run_dir: Path, is_main: bool) -> None:
        self._path, self.is_main = run_dir / EVENTS, is_main

    def add(self, event: str, **facts: Any) -> None:
        """Append an event and sync it to disk; numbers that are not finite become null, as JSON has none."""
        if not self.is_main:
            return
        is_truncated = self._path.exists() and not self._path.read_bytes().endswith(b"\n")  # by a crash
        with self._path.open("ab") as file:
            file.write(b"\n" * is_truncated + orjson.dumps({"time": time.time(), "event": event} | facts) + b"\n")
        fsync_path(self._path)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events of a run in order, empty if it never started; truncated or damaged lines are skipped."""
    path = run_dir / EVENTS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [event for event in map(_parsed, lines) if {"time", "event"} <= event.keys()]


def _parsed(line: bytes) -> dict[str, Any]:
    """Return the object on a complete line; empty if the line is truncated or damaged."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
