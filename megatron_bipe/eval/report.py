"""Report of a perplexity evaluation: JSON with all results, CSV for spreadsheets, a plot and a text table."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.curves import Curve
from megatron_bipe.eval.eval_model import EvalModel
from megatron_bipe.eval.perplexity import LengthResult, Settings, limit_tokens
from megatron_bipe.eval.plot import draw_perplexity
from megatron_bipe.eval.sequences import PROTOCOLS
from megatron_bipe.eval.text_table import text_table
from megatron_bipe.io import write_atomically

FORMAT_VERSION = 1
JSON_NAME, CSV_NAME, PNG_NAME = "perplexity.json", "perplexity.csv", "perplexity.png"


class ModelResults(NamedTuple):
    """Results of one model at all lengths, ascending."""

    eval_model: EvalModel
    results: tuple[LengthResult, ...]


def prepare_output(folder: Path, overwrite: bool, names: Sequence[str] = (JSON_NAME, CSV_NAME, PNG_NAME)) -> None:
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


def write_report(folder: Path, dataset: TokenDataset, settings: Settings, models: Sequence[ModelResults]) -> list[Path]:
    """Write the three files, each atomically; existing ones are replaced."""
    contents = {
        JSON_NAME: json.dumps(as_json(dataset, settings, models), indent=2, allow_nan=False).encode() + b"\n",
        CSV_NAME: as_csv(models).encode(),
        PNG_NAME: draw_perplexity(
            [
                Curve(name, eval_model.config.train_len_tokens, [(r.length_tokens, r.perplexity) for r in results])
                for name, (eval_model, results) in zip(unique_names(models), models, strict=True)
            ],
            title=f"Perplexity by sequence length: {_data_name(dataset)}",
        ),
    }
    for name, data in contents.items():
        write_atomically(folder / name, data)
    return [folder / name for name in contents]


def as_json(dataset: TokenDataset, settings: Settings, models: Sequence[ModelResults]) -> dict[str, Any]:
    """Return all facts and results of the evaluation; infinite perplexities are null."""
    manifest = dataset.manifest
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
            "num_tokens_given": limit_tokens(dataset, settings.max_tokens),
        },
        "max_tokens": settings.max_tokens,
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
                "results": [_finite(result._asdict()) for result in results],
            }
            for name, (eval_model, results) in zip(unique_names(models), models, strict=True)
        ],
    }


def as_csv(models: Sequence[ModelResults]) -> str:
    text = io.StringIO()
    columns = ("model", "encoding", "train_len_tokens", *LengthResult._fields)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for name, (eval_model, results) in zip(unique_names(models), models, strict=True):
        for result in results:
            writer.writerow((name, eval_model.config.encoding, eval_model.config.train_len_tokens, *result))
    return text.getvalue()


def as_table(models: Sequence[ModelResults]) -> str:
    """Return perplexities as text: one row per model, one column per length; the training length is marked."""
    lengths = [result.length_tokens for result in models[0].results]
    rows = [["perplexity at", *(f"{length:,}" for length in lengths)]]
    for name, (eval_model, results) in zip(unique_names(models), models, strict=True):
        trained = eval_model.config.train_len_tokens
        marks = ["*" if result.length_tokens == trained else " " for result in results]
        cells = [f"{result.perplexity:,.2f}{mark}" for result, mark in zip(results, marks, strict=True)]
        rows.append([name, *cells])
    return f"{text_table(rows)}\n* training length"


def describe(dataset: TokenDataset, settings: Settings, results: Sequence[LengthResult]) -> str:
    """Describe the tokens that were read and dropped, one line per length."""
    given = limit_tokens(dataset, settings.max_tokens)
    lines = [f"Protocol {settings.protocol}: {PROTOCOLS[settings.protocol]}."]
    lines.append(f"Given {given:,} of the dataset's {dataset.num_tokens:,} tokens.")
    lines += [
        f"  {r.length_tokens:>9,} tokens: {r.num_sequences:,} sequences, {r.num_predictions:,} predictions, "
        f"{r.num_tokens_read:,} tokens read, {r.num_tokens_dropped:,} dropped"
        for r in results
    ]
    return "\n".join(lines)


def unique_names(models: Sequence[tuple[EvalModel, object]]) -> list[str]:
    """Return the models' names; duplicates are replaced by their sources."""
    names = [eval_model.name for eval_model, _ in models]
    return [eval_model.source if names.count(eval_model.name) > 1 else eval_model.name for eval_model, _ in models]


def _data_name(dataset: TokenDataset) -> str:
    return dataset.path.resolve().name


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
