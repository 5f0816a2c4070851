"""The tables of docs/ as data."""

import json
import re
from pathlib import Path

from tests.helpers.paths import ROOT

OPTIONAL = {"branch_from"}  # only where a branch begins


def documented(page: str, begin: str) -> dict[str, list[str]]:
    """Return a table of docs/PAGE: the names in the second cell of each row, by the first one in its first cell.

    Args:
        page: name of the file.
        begin: the beginning of the table, which no other table has.
    """
    text = (ROOT / "docs" / page).read_text("utf-8")
    tables = [table for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE) if table.startswith(begin)]
    assert len(tables) == 1, begin
    rows = [row.strip("|").split("|") for row in tables[0].splitlines()[2:]]
    names = [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in rows]
    return {first[0]: second for first, second, *_ in names}


def assert_events_are_documented(run_dir: Path) -> None:
    """Assert that docs/run_folder.md lists the keys of every event of a run."""
    events = documented("run_folder.md", "| event |")
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        keys = set(events[event["event"]])
        assert keys - OPTIONAL <= event.keys() - {"time", "event"} <= keys, event
