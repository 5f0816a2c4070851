"""The provenance of each start on a run's page, and what changed between starts.

`train.provenance` records it; starts of earlier versions have step and ranks only.
"""

import json
from collections.abc import Iterator, Mapping
from html import escape
from itertools import pairwise
from typing import Any

from megatron_bipe.eval.page import details, paragraph, table
from megatron_bipe.monitor.event_text import moment
from megatron_bipe.monitor.history import RunHistory
from megatron_bipe.run_files import START, TIME

# Keys that differ at every start.
_OWN = {TIME, "event", "step", "launched_at", "before", "job", "branch_from"}
# Facts that follow from others, which are compared.
_DERIVED = {"command", "precision.reason", "compile.reason"}
_MAX_STARTS = 50


def provenance_section(history: RunHistory) -> str:
    """Return the starts with their code and hosts, what changed between them, and all facts of the last start."""
    starts = [event for event in history.events if event["event"] == START]
    if not starts:
        return paragraph("The run has not been started.")
    rows = [_summary(start) for start in starts[-_MAX_STARTS:]]
    header = ["start", "after step", "code", "hosts", "devices", "layout", "allowed changes"]
    parts = [table(header, rows)]
    changes = [
        [moment(after[TIME]), f"<code>{escape(key)}</code>", *(_value(value, key) for value in values)]
        for before, after in pairwise(starts)
        if _is_recorded(before) and _is_recorded(after)
        for key, values in differences(facts_of(before), facts_of(after)).items()
        if key not in _DERIVED
    ]
    if changes:
        shown = table(["start", "changed", "before", "after"], changes[-4 * _MAX_STARTS :], kind="texts")
        parts.append(f"<h3>Changes between starts</h3>\n{shown}")
    if _is_recorded(starts[-1]):
        facts = [[f"<code>{escape(key)}</code>", _value(value)] for key, value in facts_of(starts[-1]).items()]
        parts.append(details("Everything that the last start recorded", table(["", ""], facts, kind="texts")))
    else:
        parts.append(paragraph("The last start was made by a version that records no provenance.", "note"))
    return "".join(parts)


def facts_of(start: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a start by dotted name, without those that differ at every start."""
    return dict(_flat({key: value for key, value in start.items() if key not in _OWN}))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return (before, after) of all keys whose values differ; None: missing."""
    keys = dict.fromkeys([*before, *after])
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def commit_text(start: Mapping[str, Any]) -> str:
    """Return the commit of a start, or the hash of its source where git does not track it."""
    code, versions = _mapping(start.get("code")), _mapping(start.get("versions"))
    if "commit" in code:
        return f"{str(code['commit'])[:10]}{', modified' if code.get('dirty') else ''}"
    return f"source {versions['source']}" if "source" in versions else ""


def _is_recorded(start: Mapping[str, Any]) -> bool:
    return "versions" in start


def _summary(start: Mapping[str, Any]) -> list[str]:
    hosts = _counted(start.get("hosts"))
    if start.get("more_hosts"):
        hosts += f", and {start['more_hosts']} more"
    layout = _mapping(start.get("layout"))
    axes = " x ".join(f"{size} {axis}" for axis, size in layout.items() if isinstance(size, int) and size > 1)
    axes = axes.replace("1 sequence", "sequence")
    text = f"{axes or '1 replica'}, ZeRO {start.get('zero')}" if layout else f"{start.get('ranks')} ranks"
    allowed = start.get("allow")
    cells = [
        moment(start[TIME]),
        f"{start.get('step', 0):,}",
        commit_text(start),
        hosts,
        _counted(start.get("devices")),
    ]
    return [escape(cell) for cell in (*cells, text, " ".join(map(str, allowed)) if isinstance(allowed, list) else "")]


def _counted(counts: Any) -> str:
    """Return names with their counts: "node1 x 8"; of many, the first ones."""
    items = list(_mapping(counts).items())
    more = f", and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(f"{name} x {count}" for name, count in items[:4]) + more


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _value(value: Any, key: str = "") -> str:
    if value is None:
        return "<i>default</i>" if key.startswith("settings.") else "<i>none</i>"
    return escape(value if isinstance(value, str) else json.dumps(value))
