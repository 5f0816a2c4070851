"""The events of a run in words, and times and durations as text."""

import datetime
import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_bipe.run_files import AVERAGE, DONE, FAILED, START, STOP, TIME
from megatron_bipe.train.metrics_file import (
    AFTER_SAVE_FAILED,
    BAD_STEP,
    FELL_BACK,
    RETURN,
    SAVE_FAILED,
    SAVED,
    SLOW_RANK,
    TRACKER_FAILED,
    VALIDATION,
)

ROUTINE = (SAVED, VALIDATION)  # counted, not listed
_MAX_TEXT = 600  # characters of a reason


def event_text(event: Mapping[str, Any]) -> str:
    """Return a sentence about an event; an unknown or incomplete one is listed with its keys."""
    try:
        return _TEXTS[event["event"]](event)
    except (KeyError, TypeError, ValueError, IndexError):
        facts = (f"{key} {value}" for key, value in event.items() if key not in (TIME, "event"))
        return _cut(f"{event['event']}: {', '.join(facts)}")


def duration(seconds: float) -> str:
    """Return a duration with its two largest units: 3 d 4 h, 2 h 5 min, 1 min 10 s, 0.4 s."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    first = next(index for index, (size, _) in enumerate(units) if seconds >= size)
    (large, large_name), (small, small_name) = units[first : first + 2]
    count, rest = divmod(round(seconds / small), large // small)
    return f"{count} {large_name} {rest} {small_name}" if rest else f"{count} {large_name}"


def moment(time_s: float) -> str:
    """Return a time since 1970 as a date in UTC."""
    try:
        return datetime.datetime.fromtimestamp(time_s, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return "unknown"


def _start(event: Mapping[str, Any]) -> str:
    ranks = f"{event['ranks']} rank{'s' * (event['ranks'] != 1)}"
    trunk = event.get("branch_from")
    if trunk:
        return f"A launch of {ranks} began a branch from step {trunk['step']:,} of {trunk['run']}"
    return f"A launch of {ranks} began" + (f" after step {event['step']:,}" if event["step"] else "")


def _failed(event: Mapping[str, Any]) -> str:
    if event.get("by") == "supervisor":
        cause = event.get("signal") or f"exit code {event['exit_code']}"
        wait_s = event.get("wait_s")
        then = "no further launch follows" if wait_s is None else f"the next launch follows in {duration(wait_s)}"
        return _cut(f"The supervisor saw launch {event['attempt']} end with {cause}; {then}. {event['reason'] or ''}")
    return _cut(f"Rank {event['rank']} ({event['name']}) failed at {event['at']}: {event['reason']}")


def _bad_step(event: Mapping[str, Any]) -> str:
    first, stop = event["samples"]
    return _cut(f"Step {event['step']:,} was bad: {event['reason']}. Its samples are {first:,} to {stop - 1:,}")


def _return(event: Mapping[str, Any]) -> str:
    first, stop = event["samples"]
    back = f"Rolled back from step {event['step']:,} to {event['to_step']:,}"
    return f"{back}; samples {first:,} to {stop - 1:,} are skipped"


def _fell_back(event: Mapping[str, Any]) -> str:
    skipped = "; ".join(f"step {item['step']:,}: {item['reason']}" for item in event["skipped"])
    return _cut(f"Continued from the checkpoint of step {event['to_step']:,}, as newer ones are unusable: {skipped}")


def _average(event: Mapping[str, Any]) -> str:
    sources = ", ".join(f"step {source['step']:,} of {source['run']}" for source in event["sources"])
    return _cut(f"The weights of step 0 were made by tools/average.py: the mean of {sources}")


def _slow_rank(event: Mapping[str, Any]) -> str:
    return (
        f"{event['name']} was slow up to step {event['step']:,}: it computed for {event['own_s']:.3g} s in "
        f"{event['steps']} steps, the median of all ranks is {event['median_s']:.3g} s"
    )


_TEXTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    START: _start,
    STOP: lambda event: f"Stopped on request after step {event['step']:,}",
    DONE: lambda event: f"Reached step {event['step']:,}, the last one of this launch",
    FAILED: _failed,
    SAVED: lambda event: f"Saved step {event['step']:,}: {event['bytes'] / 1e9:.3g} GB in {duration(event['seconds'])}",
    SAVE_FAILED: lambda event: _cut(f"The checkpoint of step {event['step']:,} was not written: {event['reason']}"),
    AFTER_SAVE_FAILED: lambda event: _cut(
        f"checkpoint.after_save failed for the checkpoint of step {event['step']:,}: {event['reason']}"
    ),
    TRACKER_FAILED: lambda event: _cut(
        f"The tracker {event['tracker']} failed, and receives nothing more from this launch: {event['reason']}"
    ),
    FELL_BACK: _fell_back,
    VALIDATION: lambda event: f"Validation after step {event['step']:,}: {event['loss_nats']:.4f} nats per token",
    BAD_STEP: _bad_step,
    RETURN: _return,
    SLOW_RANK: _slow_rank,
    AVERAGE: _average,
}


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
