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
import threading
import time
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from megatron_bipe.io import read_again
from megatron_bipe.runtime.observer import Observer
from megatron_bipe.train.log_file import LogFile

_log = logging.getLogger(__name__)

METRICS, EVENTS, EVALUATIONS = "metrics.jsonl", "events.jsonl", "evaluations.jsonl"
LOCK_FOLDER = "running"  # in the run folder, too
START, STOP, DONE, FAILED = "start", "stop", "done", "failed"
SAVED, SAVE_FAILED, FELL_BACK, VALIDATION = "saved", "save failed", "fell back", "validation"
AVERAGE = "average"  # not of a launch: tools/average.py made the folder
RECORD_WAIT_S = 5.0
TIME = "time"  # when the line was written, seconds since 1970, as events.jsonl has it
STEP_TIME, VALID_LOSS = "time/step_s", "loss/valid_nats"
ValidValue = Literal["nats", "perplexity", "bits_per_byte", "nats_by_position"]


def valid_key(name: str, length_tokens: int, value: ValidValue) -> str:
    """Return the key of a value of a validation, by the name of its set and the sequence length."""
    return f"valid/{name}/{length_tokens}/{value}"


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
        path.touch()
        kept = scan(path, last_step, valid_owed)
        os.truncate(path, kept.size_bytes)
        self._file = LogFile(path)
        self.step_time_s = kept.step_time_s
        self.last_lines = kept.last_lines

    def add(self, values: Mapping[str, Any]) -> None:
        """Append a line; numbers that are not finite become null, as JSON has none."""
        self._file.add(orjson.dumps(values) + b"\n")
        self.step_time_s += values.get(STEP_TIME, 0.0)

    def sync(self) -> None:
        self._file.write(sync=True)

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
        self.is_main, self._lock = is_main, threading.Lock()
        self._file = LogFile(run_dir / EVENTS)

    def add(self, event: str, **facts: Any) -> None:
        """Append an event and sync it to disk; numbers that are not finite become null, as JSON has none."""
        if not self.is_main:
            return
        with self._lock:  # a background thread reports checkpoints
            line = orjson.dumps({"time": time.time(), "event": event} | facts) + b"\n"
            self._file.add(b"\n" * _is_truncated(self._file.path) + line)
            self._file.write(sync=True)


class RunObserver(Observer):
    """Observer that records what happens to checkpoints, and passes on the progress.

    Args:
        events: event log.
        heartbeat: called on progress.
    """

    def __init__(self, events: Events, heartbeat: Callable[[], None]) -> None:
        self._events, self._heartbeat = events, heartbeat

    def progress(self) -> None:
        self._heartbeat()

    def saved(self, step: int, num_bytes: int, seconds: float) -> None:
        self._events.add(SAVED, step=step, bytes=num_bytes, seconds=seconds)

    def save_failed(self, step: int, reason: str) -> None:
        self._events.add(SAVE_FAILED, step=step, reason=reason)

    def fell_back(self, to_step: int, skipped: Mapping[int, str]) -> None:
        reasons = [{"step": step, "reason": reason} for step, reason in skipped.items()]
        self._events.add(FELL_BACK, to_step=to_step, skipped=reasons)


def record_failure(run_dir: Path, failure: Mapping[str, Any]) -> None:
    """Record why a launch ends, on any rank; the disk may be what fails, so do not wait long for it."""
    recorder = threading.Thread(target=partial(Events(run_dir, True).add, FAILED, **failure), daemon=True)
    recorder.start()
    recorder.join(RECORD_WAIT_S)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events of a run in order, as `read_lines` does."""
    return read_lines(run_dir / EVENTS, {TIME, "event"})


def read_lines(path: Path, required: Set[str]) -> list[dict[str, Any]]:
    """Return the lines of a JSON-lines file that have all required keys, in order; empty if the file does not exist.

    Truncated and damaged lines are skipped.
    """
    try:
        lines = read_again(path.read_bytes).splitlines(keepends=True)
    except (FileNotFoundError, NotADirectoryError):
        lines = []
    return [values for values in map(_parsed, lines) if required <= values.keys()]


def _is_truncated(path: Path) -> bool:
    """Return True if a crash has left the last line of a file incomplete."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
    return False


def _parsed(line: bytes) -> dict[str, Any]:
    """Return the object on a complete line; empty if the line is truncated or damaged."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
