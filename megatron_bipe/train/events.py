"""What happened to a run besides steps: starts, stops, bad steps, returns, slow ranks; one line each, never rewritten.

RUN/events.jsonl     {"time": seconds since 1970, "event": "start" | "stop" | ..., and what belongs to it}

Every start of a run adds to it, so that the first line tells when the run began, and the last how it ended.
"""

import json
import time
from pathlib import Path
from typing import Any

import orjson

from megatron_bipe.io import sync

EVENTS = "events.jsonl"
START, STOP, DONE = "start", "stop", "done"


class Events:
    """Adds to the events of a run; ranks other than the main one write nothing.

    Args:
        run_dir: of the run.
        is_main: whether this rank writes.
    """

    def __init__(self, run_dir: Path, is_main: bool) -> None:
        self._path, self.is_main = run_dir / EVENTS, is_main

    def add(self, event: str, **facts: Any) -> None:
        """Add one; it is on the disk when this returns. Numbers that are not finite are null, as JSON has none."""
        if not self.is_main:
            return
        cut_off = self._path.exists() and not self._path.read_bytes().endswith(b"\n")  # by a crash
        with self._path.open("ab") as file:
            file.write(b"\n" * cut_off + orjson.dumps({"time": time.time(), "event": event} | facts) + b"\n")
        sync(self._path)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run, in order; none where it never started. Lines that are cut off or damaged are left out."""
    path = run_dir / EVENTS
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [event for event in map(_parsed, lines) if event is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"time", "event"} <= event.keys() else None
