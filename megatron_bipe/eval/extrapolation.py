"""The extrapolation report: perplexity by window length and by place in the window, per subset, beside the paper's."""

import base64
import csv
import io
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_bipe.data.files import write_atomically
from megatron_bipe.eval.documents import INTERVAL, NUM_RESAMPLES, DocumentLosses
from megatron_bipe.eval.extrapolation_plot import draw_extrapolation
from megatron_bipe.eval.perplexity import Settings
from megatron_bipe.eval.subsets import Subset
from megatron_bipe.eval.windows import PROTOCOLS

FORMAT_VERSION = 1
NAMES = JSON_NAME, CSV_NAME, PNG_NAME, HTML_NAME = tuple(
    f"extrapolation.{kind}" for kind in ("json", "csv", "png", "html")
)


def write_extrapolation(folder: Path, settings: Settings, subsets: Sequence[Subset]) -> list[Path]:
    """Write JSON, CSV, PNG and a page that needs no other file; existing ones are replaced, each in one step."""
    picture = draw_extrapolation(subsets)
    contents = {
        JSON_NAME: json.dumps(as_json(settings, subsets), indent=2, allow_nan=False).encode() + b"\n",
        CSV_NAME: as_csv(subsets).encode(),
        PNG_NAME: picture,
        HTML_NAME: as_html(settings, subsets, picture).encode(),
    }
    for name, data in contents.items():
        write_atomically(folder / name, data)
    return [folder / name for name in contents]


def as_json(settings: Settings, subsets: Sequence[Subset]) -> dict[str, Any]:
    """Everything about the evaluation; infinite perplexities are null."""
    return {
        "format_version": FORMAT_VERSION,
        "protocol": settings.protocol,
        "protocol_means": PROTOCOLS[settings.protocol],
        "max_tokens": settings.max_tokens,
        "interval": f"{INTERVAL:.0%} of {NUM_RESAMPLES} corpora resampled by document",
        "subsets": [
            {
                "name": subset.name,
                "fingerprint": subset.fingerprint,
                "paper": [curve._asdict() for curve in subset.paper],
                "models": [
                    {
                        "name": line.model,
                        "source": line.source,
                        "encoding": line.encoding,
                        "train_len_tokens": line.train_len_tokens,
                        "results": [_result(losses) for losses in line.losses],
                    }
                    for line in subset.lines
                ],
            }
            for subset in subsets
        ],
    }


def _result(losses: DocumentLosses) -> dict[str, Any]:
    bounds = losses.interval()
    return {
        "length_tokens": losses.length_tokens,
        "perplexity": _finite(losses.perplexity),
        "interval": bounds and [_finite(bound) for bound in bounds],
        "num_predictions": int(losses.counts_DP.sum()),
        "num_documents": int((losses.counts_DP.sum(1) > 0).sum()),
        "by_place": [{"tokens": place, "perplexity": _finite(value)} for place, value in losses.by_place],
    }


def as_csv(subsets: Sequence[Subset]) -> str:
    """One row a subset, model and length, the paper's after ours, with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("subset", "model", "encoding", "length_tokens", "perplexity", "low", "high"))
    for subset in subsets:
        for line in subset.lines:
            for losses in line.losses:
                bounds = losses.interval() or ("", "")
                writer.writerow(
                    (subset.name, line.model, line.encoding, losses.length_tokens, losses.perplexity, *bounds)
                )
        for curve in subset.paper:
            for length, value in curve.points:
                row = (subset.name, f"paper: {curve.name}", curve.encoding, length, value, "", "")
                writer.writerow(row)
    return text.getvalue()


def as_html(settings: Settings, subsets: Sequence[Subset], picture: bytes) -> str:
    """One page without links to other files."""
    shown = base64.b64encode(picture).decode()
    return _PAGE.format(
        picture=shown,
        protocol=escape(f"{settings.protocol}: {PROTOCOLS[settings.protocol]}"),
        interval=f"{INTERVAL:.0%}",
        resamples=f"{NUM_RESAMPLES:,}",
        tables="\n".join(_table(subset) for subset in subsets),
    )


def _table(subset: Subset) -> str:
    lengths = [losses.length_tokens for losses in subset.lines[0].losses]
    rows = [_row(["perplexity at", *(f"{length:,}" for length in lengths)], "th")]
    for line in subset.lines:
        cells = []
        for losses in line.losses:
            bounds = losses.interval()
            between = f"<small>{_shown(bounds[0])} to {_shown(bounds[1])}</small>" if bounds else ""
            mark = " *" if losses.length_tokens == line.train_len_tokens else ""
            cells.append(f"{_shown(losses.perplexity)}{mark}{between}")
        rows.append(_row([escape(line.model), *cells]))
    for curve in subset.paper:
        values = dict(curve.points)
        cells = [_shown(values[length]) if length in values else "" for length in lengths]
        rows.append(_row([f"{escape(curve.name)}, the paper's", *cells], kind="paper"))
    documents = int((subset.lines[0].losses[0].counts_DP.sum(1) > 0).sum())
    about = f"{documents:,} documents, fingerprint {escape(subset.fingerprint)}"
    return f"<h2>{escape(subset.name)}</h2>\n<table>\n{''.join(rows)}</table>\n<p>{about}</p>"


def _row(cells: Sequence[str], tag: str = "td", kind: str = "ours") -> str:
    return f'<tr class="{kind}">' + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>\n"


def _shown(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.1e}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Extrapolation</title>
<style>
body {{ font: 15px/1.45 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }}
td:first-child, th:first-child {{ text-align: left; }}
small {{ display: block; color: #666; }}
.paper {{ color: #666; font-style: italic; }}
</style>
<h1>Perplexity beyond the training length</h1>
<img alt="Perplexity by window length and by place in the window" src="data:image/png;base64,{picture}">
{tables}
<p>* training length. Small figures: {interval} of {resamples} corpora that were drawn from the documents with
replacement. Protocol {protocol}. The paper's figures are read off its Figure 4 (models of 151M parameters, trained at
1,024 tokens on the Pile; about &plusmn;0.2 on PG-19 and &plusmn;0.06 elsewhere).</p>
</html>
"""
