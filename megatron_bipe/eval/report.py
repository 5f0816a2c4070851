"""Report of a perplexity evaluation: JSON with all results, CSV for spreadsheets, a plot and a text table."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.chart import Line, draw_chart, perplexity_chart
from megatron_bipe.eval.eval_model import EvalModel
from megatron_bipe.eval.perplexity import EvalSettings, PerplexityResult, evaluate_perplexity
from megatron_bipe.eval.sequences import (
    DEFAULT_EMPTY_TEXTS,
    PROTOCOLS,
    SelectedText,
    Text,
    bits_per_byte,
    cut_sequences,
)
from megatron_bipe.io import write_atomically
from megatron_bipe.picture import DEFAULT_PICTURE, Measure, PictureSettings, picture_files, picture_names
from megatron_bipe.text_table import csv_text, text_table

FORMAT_VERSION = 1
STEM = "perplexity"
JSON_NAME, CSV_NAME = f"{STEM}.json", f"{STEM}.csv"
NAMES = (JSON_NAME, CSV_NAME, *picture_names(STEM))
STORED_NAMES = {"num_sequences": "num_windows"}  # of fields of `PerplexityResult`, in the files


class ModelResults(NamedTuple):
    """Results of one model at all lengths, ascending."""

    eval_model: EvalModel
    results: tuple[PerplexityResult, ...]


def prepare_output(folder: Path, overwrite: bool, names: Sequence[str] = NAMES) -> None:
    """Create the output folder before a long evaluation starts; `names` are the files that will be written.

    Raises:
        ConfigError: the folder has results and `overwrite` is False, or it cannot be created.
    """
    present = [name for name in names if (folder / name).exists()]
    if present and not overwrite:
        raise ConfigError(
            f"the folder already has {', '.join(present)}",
            remedy="Add --overwrite, or choose another --output",
            location=folder,
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the folder cannot be created: {error.strerror}"
        raise ConfigError(what, remedy="Choose another --output", location=folder) from error


def evaluate_model(
    eval_model: EvalModel, dataset: TokenDataset, lengths: Sequence[int], settings: EvalSettings
) -> ModelResults:
    """Evaluate a model at all lengths, ascending; progress is shown on a terminal.

    Raises:
        BipeError: as in `evaluate_perplexity`; one for a length is raised before anything is run.
    """
    text = settings.select(dataset)
    cuts = [cut_sequences(text, text.num_tokens, length, settings.protocol) for length in lengths]
    total = sum(int(sequences.num_inputs.sum()) for sequences in cuts)
    results: list[PerplexityResult] = []
    with tqdm(total=total, desc=eval_model.name, unit=" tokens", unit_scale=True, disable=None) as bar:
        for length in reversed(lengths):  # longest first, so that a length that is too large fails at once
            results.insert(0, evaluate_perplexity(eval_model, text, length, settings, bar.update))
            bar.set_postfix_str(f"{length}: {results[0].perplexity:.2f}")
    eval_model.model.cpu()
    return ModelResults(eval_model, tuple(results))


def check_measure(measure: Measure, dataset: TokenDataset, lengths: Sequence[int], settings: EvalSettings) -> None:
    """Refuse a picture of bits per byte where these will not be known.

    Raises:
        ConfigError: the protocol reads tokens that it does not predict, or the size of the raw text is unknown.
    """
    if measure != "bits-per-byte":
        return
    text = settings.select(dataset)
    cuts = [cut_sequences(text, text.num_tokens, length, settings.protocol) for length in lengths]
    if all(bits_per_byte(text, sequences, 0.0) is not None for sequences in cuts):
        return
    if dataset.manifest.text_bytes:
        what, remedy = f"protocol {settings.protocol} reads tokens that it does not predict", "Use --protocol full"
    else:
        what, remedy = "the dataset does not record the size of its raw text", "Use --y nats"
    raise ConfigError(f"bits per byte are not known: {what}", remedy=remedy, location="--y")


def write_report(
    folder: Path,
    dataset: TokenDataset,
    settings: EvalSettings,
    models: Sequence[ModelResults],
    picture: PictureSettings = DEFAULT_PICTURE,
) -> list[Path]:
    """Write all files, each atomically; existing ones are replaced."""
    lines = []
    for style, (name, eval_model, results) in enumerate(_named(models)):
        points = [(r.length_tokens, _measured(r, picture.measure)) for r in results]
        config = eval_model.config
        lines.append(Line(name, points, style, config.train_len_tokens, encoding=config.encoding))
    quantity = {"perplexity": "Perplexity", "nats": "Loss", "bits-per-byte": "Bits per byte"}[picture.measure]
    title = f"{quantity} by sequence length: {_data_name(dataset)}"
    chart = perplexity_chart(lines, title, measure=picture.measure)
    contents: dict[str, str | bytes] = {
        JSON_NAME: json.dumps(as_json(dataset, settings, models), indent=2, allow_nan=False) + "\n",
        CSV_NAME: as_csv(models),
        **picture_files(STEM, draw_chart(chart, picture), picture.formats),
    }
    return write_files(folder, contents, NAMES)


def write_files(folder: Path, contents: Mapping[str, str | bytes], names: Sequence[str] = ()) -> list[Path]:
    """Write files, each atomically, and delete the others of `names`, which an earlier evaluation made."""
    for name, content in contents.items():
        write_atomically(folder / name, content.encode() if isinstance(content, str) else content)
    for name in set(names) - set(contents):
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in contents]


def as_json(dataset: TokenDataset, settings: EvalSettings, models: Sequence[ModelResults]) -> dict[str, Any]:
    """Return all facts and results of the evaluation; infinite perplexities are null."""
    manifest, text = dataset.manifest, settings.select(dataset)
    return {
        "format_version": FORMAT_VERSION,
        "protocol": settings.protocol,
        "protocol_means": PROTOCOLS[settings.protocol],
        "data": {
            "name": _data_name(dataset),
            "fingerprint": manifest.fingerprint,
            "tokenizer_fingerprint": manifest.tokenizer.fingerprint,
            "segments": manifest.rule.spec,
            "num_documents": manifest.num_documents,
            "num_tokens": dataset.num_tokens,
            "num_tokens_given": text.num_tokens,
            **({"documents_given": selection_text(text, settings)} if isinstance(text, SelectedText) else {}),
        },
        "max_tokens": settings.max_tokens,
        **empty_texts_fact(settings),
        "batch_tokens": settings.batch_tokens,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "device": settings.device,
        "torch": torch.__version__,
        "models": [
            {
                "name": name,
                "source": eval_model.source,
                "encoding": eval_model.config.encoding,
                "num_parameters": sum(parameter.numel() for parameter in eval_model.model.parameters()),
                "train_len_tokens": eval_model.config.train_len_tokens,
                "results": [_stored(result) for result in results],
            }
            for name, eval_model, results in _named(models)
        ],
    }


def empty_texts_fact(settings: EvalSettings) -> dict[str, str]:
    """Return the setting for a report if it is not the default; reports of earlier versions have no such key."""
    return {} if settings.empty_texts == DEFAULT_EMPTY_TEXTS else {"empty_texts": settings.empty_texts}


def as_csv(models: Sequence[ModelResults]) -> str:
    fields = (STORED_NAMES.get(field, field) for field in PerplexityResult._fields)
    rows = [
        (name, eval_model.config.encoding, eval_model.config.train_len_tokens, *result)
        for name, eval_model, results in _named(models)
        for result in results
    ]
    return csv_text([("model", "encoding", "train_len_tokens", *fields), *rows])


def as_table(models: Sequence[ModelResults]) -> str:
    """Return perplexities as text: one row per model, one column per length; the training length is marked."""
    lengths = [result.length_tokens for result in models[0].results]
    rows = [["perplexity at", *(f"{length:,}" for length in lengths)]]
    for name, eval_model, results in _named(models):
        trained = eval_model.config.train_len_tokens
        marks = ["*" if result.length_tokens == trained else " " for result in results]
        cells = [f"{result.perplexity:,.2f}{mark}" for result, mark in zip(results, marks, strict=True)]
        rows.append([name, *cells])
    return f"{text_table(rows, head=1)}\n* training length"


def coverage_text(dataset: TokenDataset, settings: EvalSettings, results: Sequence[PerplexityResult]) -> str:
    """Return the numbers of tokens that were read and dropped, one line per length."""
    text = settings.select(dataset)
    lines = [f"Protocol {settings.protocol}: {PROTOCOLS[settings.protocol]}."]
    lines.append(
        f"Given {text.num_tokens:,} of the dataset's {dataset.num_tokens:,} tokens: {selection_text(text, settings)}."
    )
    lines += [
        f"  {r.length_tokens:>9,} tokens: {r.num_sequences:,} sequences, {r.num_predictions:,} predictions, "
        f"{r.num_tokens_read:,} tokens read, {r.num_tokens_dropped:,} dropped"
        for r in results
    ]
    return "\n".join(lines)


def selection_text(text: Text, settings: EvalSettings) -> str:
    """Describe the documents that an evaluation reads."""
    if not isinstance(text, SelectedText):
        return "all documents"
    if text.is_part_of_one:
        return f"the first {text.num_tokens:,} tokens of one document, which is longer"
    kind = "without those of empty texts" if settings.max_tokens is None else "spread evenly over the dataset"
    return f"{text.document_bounds().size - 1:,} complete documents of {text.manifest.num_documents:,}, {kind}"


def unique_names(eval_models: Sequence[EvalModel]) -> list[str]:
    """Return the models' names; duplicates are replaced by their sources."""
    names = [eval_model.name for eval_model in eval_models]
    return [each.source if names.count(each.name) > 1 else each.name for each in eval_models]


def finite_or_none(value: float) -> float | None:
    """Return the number as JSON can hold it."""
    return value if math.isfinite(value) else None


def _named(models: Sequence[ModelResults]) -> list[tuple[str, EvalModel, tuple[PerplexityResult, ...]]]:
    names = unique_names([eval_model for eval_model, _ in models])
    return [(name, *model) for name, model in zip(names, models, strict=True)]


def _measured(result: PerplexityResult, measure: Measure) -> float:
    if measure == "bits-per-byte":
        return math.nan if result.bits_per_byte is None else result.bits_per_byte
    return result.perplexity if measure == "perplexity" else result.nats_per_token


def _data_name(dataset: TokenDataset) -> str:
    return dataset.path.resolve().name


def _stored(result: PerplexityResult) -> dict[str, Any]:
    values = result._asdict() | {"perplexity": finite_or_none(result.perplexity)}
    return {STORED_NAMES.get(field, field): value for field, value in values.items()}
