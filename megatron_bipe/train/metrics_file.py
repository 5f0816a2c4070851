"""metrics.jsonl: a line of JSON for each step, and one for each validation, in order, each once.

A run that goes on from a checkpoint does again what came after it. So opening the file cuts it off there; a cut is one
call to the system, which a kill either comes before or after. What a checkpoint's steps have written is on the disk
before the checkpoint is (`sync`), so that nothing is missing either.
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
    """What of a file stays."""

    size_bytes: int
    step_time_s: float  # of all steps in it together
    last_lines: list[dict[str, Any]]  # of the last step


class MetricsFile:
    """The file of a run, open for appending.

    Args:
        path: of the file.
        last_step: later lines are dropped, and what a crash cut off.
        valid_owed: whether the validation of that step is to be done again, too.
    """

    def __init__(self, path: Path, last_step: int, valid_owed: bool = False) -> None:
        self._file = path.open("ab")
        kept = scan(path, last_step, valid_owed)
        self._file.truncate(kept.size_bytes)
        self.step_time_s = kept.step_time_s
        self.last_lines = kept.last_lines

    def add(self, values: Mapping[str, Any]) -> None:
        """Append a line; JSON has no numbers that are not finite, and null stands for them."""
        self._file.write(orjson.dumps(values) + b"\n")
        self._file.flush()
        self.step_time_s += values.get(STEP_TIME, 0.0)

    def sync(self) -> None:
        """Have the disk hold it all."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write no more."""
        self._file.close()


def scan(path: Path, last_step: int, valid_owed: bool = False) -> Kept:
    """The beginning of a file up to the last whole line about steps up to `last_step`; as `MetricsFile` takes it."""
    read_bytes, size_bytes, step_time_s, last_lines = 0, 0, 0.0, list[dict[str, Any]]()
    with path.open("rb") as file:
        for line in file:
            read_bytes += len(line)
            values = _parsed(line)
            if "step" not in values:  # damaged; it stays where good lines follow
                continue
            step = values["step"]
            if step > last_step or (valid_owed and step == last_step and VALID_LOSS in values):
                break
            if read_bytes - len(line) > size_bytes:
                _log.warning("%s has damaged lines before step %s; they are left as they are", path, step)
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
