"""Results of the GPU check: as JSON, as text, and as rows of docs/performance.md."""

import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpu.check import PREDICTED, Criterion, Figure, Outcome, as_json
from megatron_bipe.errors import ConfigError
from megatron_bipe.io import write_atomically
from megatron_bipe.text_table import text_table

BEGIN, END = "<!-- gpu-check: rows begin -->", "<!-- gpu-check: rows end -->"
RESULTS = "results.json"
VERSIONS = ("python", "torch", "cuda", "cudnn", "deepspeed", "transformers", "triton")
SHOWN_PARTS = ("speed-151m", "speed-1.6b", "peers")  # of these, docs/performance.md has every figure


class Row(NamedTuple):
    """A figure with its prediction, its criterion and the verdict, as text; "" where there is none."""

    figure: str
    measured: str
    predicted: str
    required: str
    verdict: str


def rows_of(outcome: Outcome, *, all_figures: bool) -> Iterator[Row]:
    """Yield the figures that have a criterion, and others if they are wanted."""
    judged = dict(zip(outcome.criteria, outcome.verdicts, strict=True))
    by_figure = {criterion.figure: criterion for criterion in judged}
    names = [*by_figure, *(name for name in outcome.figures if name not in by_figure)]
    for name in names:
        if name.endswith(PREDICTED) or (name not in by_figure and not all_figures):
            continue
        figures, criterion = outcome.figures, by_figure.get(name)
        yield Row(
            name,
            as_text(figures.get(name, "")),
            as_text(figures.get(name + PREDICTED, "")),
            required(criterion) if criterion else "",
            judged[criterion] if criterion else "",
        )


def required(criterion: Criterion) -> str:
    return f"{'aim ' if criterion.is_aim else ''}{criterion.comparison} {as_text(criterion.limit)}"


def as_text(value: Figure) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def as_table(outcomes: Sequence[Outcome], on_gpu: bool) -> str:
    """Return a table of the parts, and one of the criteria."""
    parts = [["part", "result", "seconds"]]
    parts += [[o.name, o.failure or ("failed" if o.is_failed else "done"), f"{o.seconds:.0f}"] for o in outcomes]
    rows = [["figure", "measured", "predicted", "required", "verdict"]]
    rows += [list(row) for outcome in outcomes for row in rows_of(outcome, all_figures=False)]
    size = "" if on_gpu else "There is no GPU: toy sizes on the CPU, which show that the check runs, not how fast.\n\n"
    return f"{size}{text_table(parts)}\n{text_table(rows)}"


def write_results(folder: Path, outcomes: Sequence[Outcome], command: str) -> None:
    """Write all figures and verdicts to results.json."""
    parts = [
        {
            "part": o.name,
            "failure": o.failure,
            "failed": o.is_failed,
            "seconds": round(o.seconds, 1),
            "figures": as_json(o.figures),
            "criteria": [
                {**criterion._asdict(), "verdict": verdict}
                for criterion, verdict in zip(o.criteria, o.verdicts, strict=True)
            ],
        }
        for o in outcomes
    ]
    content = {"command": command, "date": today(), "parts": parts}
    write_atomically(folder / RESULTS, (json.dumps(content, indent=1) + "\n").encode())


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def docs_rows(outcomes: Sequence[Outcome], command: str, date: str) -> str:
    """Return what docs/performance.md has between the markers."""
    found: dict[str, Figure] = {}
    for outcome in outcomes:
        found |= outcome.figures if outcome.name == "versions" else {}
    versions = ", ".join(f"{name} {found[name]}" for name in VERSIONS if name in found)
    lines = [f"    {command}", "", f"{found.get('device', 'An unknown GPU')}; {versions}; {date}.", ""]
    lines += ["| figure | measured | predicted | required | verdict |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        if outcome.failure:
            lines.append(f"| {outcome.name} | | | | failed: {outcome.failure.replace('|', '/')} |")
        rows = rows_of(outcome, all_figures=outcome.name in SHOWN_PARTS)
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def split_page(page: Path) -> tuple[str, str]:
    """Return what a page has before and after the markers of the rows.

    Raises:
        ConfigError: the page does not have both markers once, in this order.
    """
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ConfigError(
            f"the page must have the lines {BEGIN} and {END}, once each",
            remedy="Restore them, or name another page",
            location=page,
        )
    return before, after


def write_docs(page: Path, text: str) -> None:
    """Replace the rows between the markers of a page; raises what `split_page` does."""
    before, after = split_page(page)
    write_atomically(page, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".encode())
