"""The two logs of a run, in JSON lines; docs/run_folder.md lists their keys.

    RUN/metrics.jsonl    one line for each step and each validation, in order, without duplicates
    RUN/events.jsonl     {"time": seconds since 1970, "event": "start" | "stop" | ..., and the fields of the event}

A run that resumes from a checkpoint repeats the steps after it, so opening metrics.jsonl truncates it at the
checkpoint; a kill comes either before or after this single system call. The lines of a checkpoint's steps are on disk
before the checkpoint is (`sync`), so none are missing.

Lines of events.jsonl are only appended. All starts of a run append to one file: the first `start` shows when the
run began, and the last event of a launch how it ended.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from megatron_bipe.run_files import (
    EVENTS,
    FAILED,
    METRICS,
    TIME,
    is_truncated,
    parse_line,
)
from megatron_bipe.runtime.observer import Observer
from megatron_bipe.train.after_save import AfterSave
from megatron_bipe.train.log_file import LogFile

_log = logging.getLogger(__name__)

SAVED, SAVE_FAILED, FELL_BACK, VALIDATION = "saved", "save failed", "fell back", "validation"
AFTER_SAVE_FAILED, TRACKER_FAILED = "after save failed", "tracker failed"
BAD_STEP, RETURN, SLOW_RANK = "bad step", "return", "slow rank"
RECORD_WAIT_S = 5.0
STEP_TIME, VALID_LOSS, VALID_PERPLEXITY = "time/step_s", "loss/valid_nats", "valid/perplexity"
Line = dict[str, Any]  # of metrics.jsonl
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
        self.size_bytes = kept.size_bytes  # of the kept part
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
            values = parse_line(line)
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


Listener = Callable[[Mapping[str, Any]], None]


class Events:
    """Writer of the event log; only the main rank writes.

    Args:
        run_dir: folder of the run.
        is_main: True on the main rank.
        listen: called with each event, such as `Alerts.add`; it must neither wait nor fail.
    """

    def __init__(self, run_dir: Path, is_main: bool, listen: Listener = lambda _: None) -> None:
        self.is_main, self._lock, self._listen = is_main, threading.Lock(), listen
        self._file = LogFile(run_dir / EVENTS)

    def add(self, event: str, **facts: Any) -> None:
        """Append an event and sync it to disk; numbers that are not finite become null, as JSON has none."""
        if not self.is_main:
            return
        values = {TIME: time.time(), "event": event} | facts
        self._listen(values)  # first: the disk may hang
        with self._lock:  # background threads report checkpoints
            line = orjson.dumps(values) + b"\n"
            self._file.add(b"\n" * is_truncated(self._file.path) + line)
            self._file.write(sync=True)


class RunObserver(Observer):
    """Observer that records what happens to checkpoints, and passes on the progress.

    Args:
        events: event log.
        heartbeat: called on progress.
        after_save: receives each published checkpoint.
    """

    def __init__(self, events: Events, heartbeat: Callable[[], None], after_save: AfterSave | None = None) -> None:
        self._events, self._heartbeat, self._after_save = events, heartbeat, after_save

    def progress(self) -> None:
        self._heartbeat()

    def saved(self, step: int, num_bytes: int, seconds: float) -> None:
        self._events.add(SAVED, step=step, bytes=num_bytes, seconds=seconds)
        if self._after_save is not None:
            self._after_save.submit(step)

    def steps_in_use(self) -> Collection[int]:
        return () if self._after_save is None else self._after_save.steps_in_use()

    def save_failed(self, step: int, reason: str) -> None:
        self._events.add(SAVE_FAILED, step=step, reason=reason)

    def fell_back(self, to_step: int, skipped: Mapping[int, str]) -> None:
        reasons = [{"step": step, "reason": reason} for step, reason in skipped.items()]
        self._events.add(FELL_BACK, to_step=to_step, skipped=reasons)


def record_failure(run_dir: Path, failure: Mapping[str, Any], listen: Listener = lambda _: None) -> None:
    """Record why a launch ends, on any rank; the disk may be what fails, so do not wait long for it.

    Args:
        run_dir: folder of the run.
        failure: facts of the event.
        listen: as in `Events`.
    """
    recorder = threading.Thread(target=partial(Events(run_dir, True, listen).add, FAILED, **failure), daemon=True)
    recorder.start()
    recorder.join(RECORD_WAIT_S)


def read_lines_between(path: Path, start: int, stop: int | None = None) -> Iterator[tuple[Line, int]]:
    """Yield the complete lines of metrics.jsonl between two positions in bytes, each with the position of its end.

    Args:
        path: path of the file.
        start: position at which a line begins.
        stop: position at which a line ends; None: the end of the file.
    """
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            start += len(line)
            if stop is not None and start > stop:
                return
            values = parse_line(line)
            if "step" in values:
                yield values, start
