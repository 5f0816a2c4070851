"""Event log of a run: starts, stops, bad steps, rollbacks and slow ranks, one line each; lines are only appended.

RUN/events.jsonl     {"time": seconds since 1970, "event": "start" | "stop" | ..., and the fields of the event}

All starts of a run append to one file: its first line shows when the run began, and its last line how it ended.
"""

import json
import time
from pathlib import Path
from typing import Any

import orjson

from megatron_bipe.io import fsync_path

EVENTS = "events.jsonl"
START, STOP, DONE = "start", "stop", "done"


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
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [event for event in map(_parsed, lines) if event is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"time", "event"} <= event.keys() else None
