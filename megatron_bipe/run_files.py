"""The logs of a run folder, JSON lines that training and the follower append to: their names, and how they are read.

    RUN/metrics.jsonl       one line for each step and each validation, see train/metrics_file.py
    RUN/events.jsonl        {"time": seconds since 1970, "event": "start" | "stop" | ..., and the fields of the event}
    RUN/evaluations.jsonl   one line for each evaluation of a checkpoint, see eval/follow.py
    RUN/running/            lock of the launch that trains

A process that is killed, or a disk that is full, leaves a truncated line. Readers skip it, and writers end it before
they append the next one. docs/run_folder.md lists the keys of all lines.
"""

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from megatron_bipe.io import read_again

METRICS, EVENTS, EVALUATIONS = "metrics.jsonl", "events.jsonl", "evaluations.jsonl"
LOCK_FOLDER = "running"
START, STOP, DONE, FAILED = "start", "stop", "done", "failed"  # events of a launch
AVERAGE = "average"  # event: tools/average.py made the folder
TIME = "time"  # when the line was written, seconds since 1970
TAIL_BYTES = 1 << 18  # more than a thousand lines of steps


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events of a run in order, as `read_lines` does."""
    return [line for line in read_lines(run_dir / EVENTS, {TIME, "event"}) if _is_event(line)]


def _is_event(line: Mapping[str, Any]) -> bool:
    is_named = isinstance(line["event"], str) and isinstance(line[TIME], int | float)
    return is_named and isinstance(line.get("step", 0), int)


def last_launch_event(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the last event that begins or ends a launch; empty if there is none."""
    return next((event for event in reversed(events) if event["event"] in (START, STOP, DONE, FAILED)), {})


def first_start_s(events: Iterable[dict[str, Any]]) -> float | None:
    """Return the time of a run's first start, from which goodput counts; None if there is none."""
    return next((float(event[TIME]) for event in events if event["event"] == START), None)


def last_record(events: Iterable[dict[str, Any]]) -> str:
    """Return the last of START, STOP and DONE among events; "" if there is none."""
    found = ""
    for event in events:
        found = event["event"] if event["event"] in (START, STOP, DONE) else found
    return found


def read_lines(path: Path, required: Set[str]) -> list[dict[str, Any]]:
    """Return the lines of a file that have all required keys, in order; empty if the file does not exist.

    Truncated and damaged lines are skipped.
    """
    try:
        content = read_again(path.read_bytes)
    except (FileNotFoundError, NotADirectoryError):
        content = b""
    return _with_keys(content, required)


def read_last_lines(path: Path, required: Set[str], num_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """Return the lines in the last `num_bytes` of a file as `read_lines` does, whatever the size of the file.

    More is read if none of these lines has all required keys, such as after a long line of a validation.
    """

    def read() -> tuple[bytes, bool]:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - num_bytes))
            return file.read(), num_bytes >= size

    try:
        content, is_all = read_again(read)
    except (FileNotFoundError, NotADirectoryError):
        return []
    lines = _with_keys(content, required)  # the first line is probably truncated at its front
    return lines if lines or is_all else read_last_lines(path, required, 4 * num_bytes)


def parse_line(line: bytes) -> dict[str, Any]:
    """Return the object on a complete line; empty if the line is truncated or damaged."""
    try:
        values = orjson.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def is_truncated(path: Path) -> bool:
    """Return True if the last line of a file is incomplete."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
    return False


def _with_keys(content: bytes, required: Set[str]) -> list[dict[str, Any]]:
    lines = map(parse_line, content.splitlines(keepends=True))
    return [values for values in lines if required <= values.keys()]
