"""The tables of docs/ as data."""

import json
import re
from pathlib import Path

from tests.helpers.paths import ROOT

OPTIONAL = {"branch_from"}  # only where a branch begins
PROVENANCE = "| key | meaning |\n|---|---|\n| `launched_at`"  # beginning of its table


def documented(page: str, begin: str) -> dict[str, list[str]]:
    """Return a table of docs/PAGE: the names in the second cell of each row, by the first one in its first cell.

    Args:
        page: name of the file.
        begin: the beginning of the table, which no other table has.
    """
    return {first[0]: second for first, second, *_ in _names(page, begin)}


def _names(page: str, begin: str) -> list[list[list[str]]]:
    """Return the names in each cell of each row of a table."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    tables = [table for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE) if table.startswith(begin)]
    assert len(tables) == 1, begin
    rows = [row.strip("|").split("|") for row in tables[0].splitlines()[2:]]
    return [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in rows]


def assert_events_are_documented(run_dir: Path) -> None:
    """Assert that docs/run_folder.md lists the keys of every event of a run."""
    events = documented("run_folder.md", "| event |")
    provenance = {name for first, *_ in _names("run_folder.md", PROVENANCE) for name in first}
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        keys = set(events[event["event"]])
        if "launched_at" in event:
            assert provenance - {"more_hosts"} <= event.keys(), event
            event = {key: value for key, value in event.items() if key not in provenance}
        assert keys - OPTIONAL <= event.keys() - {"time", "event"} <= keys, event
