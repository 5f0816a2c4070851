"""metrics.jsonl: one JSON line for each step and each validation, in order, without duplicates.

A run that resumes from a checkpoint repeats the steps after it, so opening the file truncates it at the checkpoint; a
kill comes either before or after this single system call. The lines of a checkpoint's steps are on disk before the
checkpoint is (`sync`), so none are missing.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

_log = logging.getLogger(__name__)

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


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
