"""Extrapolation report: perplexity by sequence length and by position in the sequence, compared with the paper."""

import base64
import csv
import io
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_bipe.eval.document_losses import INTERVAL, NUM_RESAMPLES, DocumentLosses
from megatron_bipe.eval.extrapolation_plot import draw_extrapolation
from megatron_bipe.eval.extrapolation_results import Subset
from megatron_bipe.eval.page import Section, figure, page, paragraph, png, table
from megatron_bipe.eval.perplexity import Settings
from megatron_bipe.eval.sequences import PROTOCOLS
from megatron_bipe.io import write_atomically

FORMAT_VERSION = 1
NAMES = JSON_NAME, CSV_NAME, PNG_NAME, HTML_NAME = tuple(
    f"extrapolation.{kind}" for kind in ("json", "csv", "png", "html")
)


def write_extrapolation(folder: Path, settings: Settings, subsets: Sequence[Subset]) -> list[Path]:
    """Write JSON, CSV, PNG and a self-contained page, each atomically; existing files are replaced."""
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
    """Return all facts and results of the evaluation; infinite perplexities are null."""
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
        "by_place": [{"tokens": position, "perplexity": _finite(value)} for position, value in losses.by_place],
    }


def as_csv(subsets: Sequence[Subset]) -> str:
    """Return rows of the models and then of the paper for each subset, with a header."""
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
    image = png(base64.b64encode(picture).decode(), "Perplexity by sequence length and by position in the sequence")
    note = (
        f"* training length. Small figures: {INTERVAL:.0%} bootstrap interval over documents ({NUM_RESAMPLES:,} "
        f"resamples). Protocol {settings.protocol}: {PROTOCOLS[settings.protocol]}. The paper's values are digitised "
        "from its Figure 4 (151M parameters, trained at 1,024 tokens on the Pile; about ±0.2 on PG-19 and ±0.06 "
        "elsewhere)."
    )
    sections = [Section(subset.name, _table(subset)) for subset in subsets]
    lead = figure(image, escape(note))
    return page("Perplexity beyond the training length", lead, sections)


def _table(subset: Subset) -> str:
    lengths = [losses.length_tokens for losses in subset.lines[0].losses]
    rows, kinds = [], []
    for line in subset.lines:
        cells = []
        for losses in line.losses:
            bounds = losses.interval()
            between = f"<small>{_shown(bounds[0])} to {_shown(bounds[1])}</small>" if bounds else ""
            mark = " *" if losses.length_tokens == line.train_len_tokens else ""
            cells.append(f"{_shown(losses.perplexity)}{mark}{between}")
        rows.append([escape(line.model), *cells])
        kinds.append("ours")
    for curve in subset.paper:
        values = dict(curve.points)
        cells = [_shown(values[length]) if length in values else "" for length in lengths]
        rows.append([f"{escape(curve.name)}, the paper's", *cells])
        kinds.append("paper")
    documents = int((subset.lines[0].losses[0].counts_DP.sum(1) > 0).sum())
    about = f"{documents:,} documents, fingerprint <code>{escape(subset.fingerprint)}</code>"
    header = ["perplexity at", *(f"{length:,}" for length in lengths)]
    return table(header, rows, kinds) + paragraph(about, "note")


def _shown(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.1e}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
