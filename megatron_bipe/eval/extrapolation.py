"""Extrapolation report: perplexity by sequence length and by position in the sequence, compared with the paper."""

import base64
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.eval.chart import Chart, Line, draw_panels, perplexity_chart
from megatron_bipe.eval.eval_model import EvalModel
from megatron_bipe.eval.page import Section, figure, page, paragraph, png, table
from megatron_bipe.eval.perplexity import INTERVAL, NUM_RESAMPLES, DocumentLosses, EvalSettings, evaluate_documents
from megatron_bipe.eval.report import empty_texts_fact, finite_or_none, unique_names, write_files
from megatron_bipe.eval.sequences import PROTOCOLS, SelectedText
from megatron_bipe.picture import DEFAULT_PICTURE, Measure, PictureSettings, picture_files, picture_names, save_figure
from megatron_bipe.text_table import csv_text

FORMAT_VERSION = 1
STEM = "extrapolation"
JSON_NAME, CSV_NAME, HTML_NAME = (f"{STEM}.{kind}" for kind in ("json", "csv", "html"))
NAMES = (JSON_NAME, CSV_NAME, HTML_NAME, *picture_names(STEM))


class PaperCurve(NamedTuple):
    """One line of the paper's figure."""

    name: str
    encoding: str
    """This project's name of the encoding."""
    points: tuple[tuple[int, float], ...]
    """(sequence length in tokens, perplexity)."""


def _curve(name: str, encoding: str, **perplexities: float) -> PaperCurve:
    return PaperCurve(name, encoding, tuple((1024 * int(key[1:]), value) for key, value in perplexities.items()))


# Models of 151M parameters, trained at 1,024 tokens. Values beyond the figure's upper limit, 80, are omitted.
# Source: He et al. 2024 (arXiv 2401.16421), Figure 4, digitised: about +-0.2 on PG-19, +-0.06 on the others.
PAPER: dict[str, tuple[PaperCurve, ...]] = {
    "PG-19": (
        _curve("BiPE-RoPE", "bipe_rope", k1=19, k2=18.5, k3=18.7, k4=19.8, k5=22.7, k6=28.6, k7=36.6, k8=45.8),
        _curve("BiPE-ALiBi", "bipe_alibi", k1=19.6, k2=20.3, k3=22.3, k4=23.5, k5=24.2, k6=24.7, k7=25.1, k8=25.3),
        _curve("ALiBi", "alibi", k1=19, k2=19, k3=22, k4=24.4, k5=26, k6=27.2, k7=27.9, k8=28.6),
        _curve("XPOS", "xpos", k1=19.5, k2=21.3, k3=28.2, k4=35.6, k5=43.4, k6=51.7, k7=60.4, k8=69),
        _curve("Randomized RoPE", "randomized_rope", k1=23.4, k2=24.6, k3=25.5, k4=26.4, k5=39, k6=67),
        _curve("RoPE", "rope", k1=19, k2=41),
        _curve("Sinusoidal", "sinusoidal", k1=20),
    ),
    "ArXiv": (
        _curve("BiPE-RoPE", "bipe_rope", k1=6.1, k2=5.7, k4=6.0, k8=10.94),
        _curve("BiPE-ALiBi", "bipe_alibi", k1=6.15, k2=5.7, k4=6.0, k8=6.48),
        _curve("ALiBi", "alibi", k1=5.9, k2=5.5, k4=6.5, k8=6.95),
        _curve("XPOS", "xpos", k2=6.26, k4=10.6, k8=19),
    ),
    "GitHub": (
        _curve("BiPE-RoPE", "bipe_rope", k1=3.1, k2=2.9, k4=3.4, k8=11.75),
        _curve("BiPE-ALiBi", "bipe_alibi", k1=3.15, k2=3.09, k4=3.38, k8=3.6),
        _curve("ALiBi", "alibi", k8=4.12),
        _curve("XPOS", "xpos", k4=5.3, k8=13.8),
    ),
}
_WORDS = {"PG-19": ("pg-19", "pg19", "gutenberg"), "ArXiv": ("arxiv",), "GitHub": ("github",)}


class ModelLosses(NamedTuple):
    """Results of one model on one dataset."""

    model: str
    source: str
    encoding: str
    train_len_tokens: int
    losses: tuple[DocumentLosses, ...]
    """Losses at each length, ascending."""


class Subset(NamedTuple):
    """Results of all models on one dataset."""

    name: str
    """Name from `subset_names`."""
    fingerprint: str
    models: tuple[ModelLosses, ...]
    text_bytes: int | None = None
    """UTF-8 bytes of the raw text, if all of it was read; None: not known."""

    @property
    def paper(self) -> tuple[PaperCurve, ...]:
        """The paper's curves for this subset; empty if its name does not identify one."""
        return PAPER.get(paper_subset(self.name) or "", ())


def paper_subset(data_name: str) -> str | None:
    """Return the paper's subset that a dataset name identifies, e.g. PG-19 for gutenberg-pg-19; else None."""
    found = [subset for subset, words in _WORDS.items() if any(word in data_name.lower() for word in words)]
    return found[0] if len(found) == 1 else None


def subset_names(folders: Sequence[Path]) -> list[str]:
    """Return dataset names: folder names with as many parent folders as make all of them distinct."""
    paths = [folder.resolve() for folder in folders]
    different = len(set(paths))
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == different:
            break
    return names


def evaluate_subset(
    name: str, dataset: TokenDataset, models: Sequence[EvalModel], lengths: Sequence[int], settings: EvalSettings
) -> Subset:
    """Evaluate all models on a dataset at all lengths, ascending; progress is shown on a terminal."""
    results, text = [], settings.select(dataset)
    for model_name, eval_model in zip(unique_names(models), models, strict=True):
        found: list[DocumentLosses] = []
        with tqdm(desc=f"{model_name} on {name}", unit=" tokens", unit_scale=True, disable=None) as bar:
            for length in reversed(lengths):  # longest first, so that a length that is too large fails at once
                found.insert(0, evaluate_documents(eval_model, text, length, settings, bar.update))
                bar.set_postfix_str(f"{length}: {found[0].perplexity:.2f}")
        eval_model.model.cpu()
        config = eval_model.config
        known = (model_name, eval_model.source, config.encoding, config.train_len_tokens)
        results.append(ModelLosses(*known, tuple(found)))
    text_bytes = None if isinstance(text, SelectedText) else dataset.manifest.text_bytes
    return Subset(name, dataset.manifest.fingerprint, tuple(results), text_bytes)


def write_extrapolation(
    folder: Path, settings: EvalSettings, subsets: Sequence[Subset], picture: PictureSettings = DEFAULT_PICTURE
) -> list[Path]:
    """Write JSON, CSV, pictures and a self-contained page, each atomically; existing files are replaced."""
    measure = picture.measure
    panels = draw_panels([[_by_length(subset, measure), _by_position(subset, measure)] for subset in subsets], picture)
    contents: dict[str, str | bytes] = {
        JSON_NAME: json.dumps(as_json(settings, subsets), indent=2, allow_nan=False) + "\n",
        CSV_NAME: as_csv(subsets),
        HTML_NAME: as_html(settings, subsets, save_figure(panels, "png")),
        **picture_files(STEM, panels, picture.formats),
    }
    return write_files(folder, contents, NAMES)


def as_json(settings: EvalSettings, subsets: Sequence[Subset]) -> dict[str, Any]:
    """Return all facts and results of the evaluation; infinite perplexities are null."""
    return {
        "format_version": FORMAT_VERSION,
        "protocol": settings.protocol,
        "protocol_means": PROTOCOLS[settings.protocol],
        "max_tokens": settings.max_tokens,
        **empty_texts_fact(settings),
        "interval": f"{INTERVAL:.0%} of {NUM_RESAMPLES} corpora resampled by document",
        "subsets": [
            {
                "name": subset.name,
                "fingerprint": subset.fingerprint,
                "paper": [curve._asdict() for curve in subset.paper],
                "models": [
                    {
                        "name": results.model,
                        "source": results.source,
                        "encoding": results.encoding,
                        "train_len_tokens": results.train_len_tokens,
                        "results": [_result(losses) for losses in results.losses],
                    }
                    for results in subset.models
                ],
            }
            for subset in subsets
        ],
    }


def _result(losses: DocumentLosses) -> dict[str, Any]:
    bounds = losses.interval()
    return {
        "length_tokens": losses.length_tokens,
        "perplexity": finite_or_none(losses.perplexity),
        "interval": bounds and [finite_or_none(bound) for bound in bounds],
        "num_predictions": int(losses.counts_MQ.sum()),
        "num_documents": losses.num_documents,
        "by_place": [
            {"tokens": position, "perplexity": finite_or_none(value)} for position, value in losses.by_position
        ],
    }


def as_csv(subsets: Sequence[Subset]) -> str:
    """Return rows of the models and then of the paper for each subset, with a header."""
    rows: list[tuple[object, ...]] = [("subset", "model", "encoding", "length_tokens", "perplexity", "low", "high")]
    for subset in subsets:
        for results in subset.models:
            for losses in results.losses:
                row = (subset.name, results.model, results.encoding, losses.length_tokens, losses.perplexity)
                rows.append((*row, *(losses.interval() or ("", ""))))
        for curve in subset.paper:
            rows += [(subset.name, f"paper: {curve.name}", curve.encoding, *point, "", "") for point in curve.points]
    return csv_text(rows)


def _by_length(subset: Subset, measure: Measure) -> Chart:
    lines = []
    for style, results in enumerate(subset.models):
        points, band = [], []
        for losses in results.losses:
            scale = _scale(subset, losses, measure)
            points.append((losses.length_tokens, _measured(losses.perplexity, scale)))
            if bounds := losses.interval():
                low, high = (_measured(bound, scale) for bound in bounds)
                band.append((losses.length_tokens, low, high))
        trained, encoding = results.train_len_tokens, results.encoding
        lines.append(Line(results.model, points, style, trained, band, encoding=encoding))
    lines += _published(subset, measure)
    title, interval = f"{subset.name}: by sequence length", f"{INTERVAL:.0%} interval over documents"
    return perplexity_chart(lines, title, measure=measure, band_label=interval)


def _published(subset: Subset, measure: Measure) -> list[Line]:
    """Return the paper's lines of the encodings of the models; their bits per byte are not known."""
    styles = {results.encoding: style for style, results in reversed(list(enumerate(subset.models)))}
    scale = None if measure == "perplexity" else 1.0
    return [
        Line(
            f"{curve.name}, the paper's",
            [(length, _measured(value, scale)) for length, value in curve.points],
            styles[curve.encoding],
            is_published=True,
            encoding=curve.encoding,
        )
        for curve in subset.paper
        if curve.encoding in styles and measure != "bits-per-byte"
    ]


def _by_position(subset: Subset, measure: Measure) -> Chart:
    lines = []
    for style, results in enumerate(subset.models):
        losses = results.losses[-1]
        scale = _scale(subset, losses, measure)
        points = [(position, _measured(value, scale)) for position, value in losses.by_position]
        lines.append(Line(results.model, points, style, results.train_len_tokens, encoding=results.encoding))
    title = f"{subset.name}: in sequences of {subset.models[0].losses[-1].length_tokens:,}"
    return perplexity_chart(lines, title, "position in the sequence, tokens", measure)


def _scale(subset: Subset, losses: DocumentLosses, measure: Measure) -> float | None:
    """Return the factor from nats per token to the measure; None: perplexity."""
    if measure == "perplexity":
        return None
    if measure == "nats":
        return 1.0
    num_predictions = float(losses.counts_MQ.sum())
    return num_predictions / subset.text_bytes / math.log(2) if subset.text_bytes else math.nan


def _measured(perplexity: float, scale: float | None) -> float:
    return perplexity if scale is None else math.log(perplexity) * scale


def as_html(settings: EvalSettings, subsets: Sequence[Subset], picture: bytes) -> str:
    image = png(base64.b64encode(picture).decode(), "Perplexity by sequence length and by position in the sequence")
    note = (
        f"* training length. Small figures: {INTERVAL:.0%} bootstrap interval over documents ({NUM_RESAMPLES:,} "
        f"resamples). Protocol {settings.protocol}: {PROTOCOLS[settings.protocol]}. The paper's values are digitised "
        "from its Figure 4 (151M parameters, trained at 1,024 tokens on the Pile; about ±0.2 on PG-19 and ±0.06 "
        "elsewhere)."
    )
    if settings.max_tokens is not None:
        note += f" Read of each dataset: complete documents, spread evenly, of at most {settings.max_tokens:,} tokens."
    sections = [Section(subset.name, _table(subset)) for subset in subsets]
    return page("Perplexity beyond the training length", figure(image, escape(note)), sections)


def _table(subset: Subset) -> str:
    lengths = [losses.length_tokens for losses in subset.models[0].losses]
    rows, kinds = [], []
    for results in subset.models:
        cells = []
        for losses in results.losses:
            bounds = losses.interval()
            between = f"<small>{_shown(bounds[0])} to {_shown(bounds[1])}</small>" if bounds else ""
            mark = " *" if losses.length_tokens == results.train_len_tokens else ""
            cells.append(f"{_shown(losses.perplexity)}{mark}{between}")
        rows.append([escape(results.model), *cells])
        kinds.append("ours")
    for curve in subset.paper:
        values = dict(curve.points)
        cells = [_shown(values[length]) if length in values else "" for length in lengths]
        rows.append([f"{escape(curve.name)}, the paper's", *cells])
        kinds.append("paper")
    documents = subset.models[0].losses[0].num_documents
    about = f"{documents:,} documents, fingerprint <code>{escape(subset.fingerprint)}</code>"
    header = ["perplexity at", *(f"{length:,}" for length in lengths)]
    return table(header, rows, kinds) + paragraph(about, "note")


def _shown(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.1e}"
