"""Losses of each document at each length as a CSV file, from which runs are compared without evaluating them again.

Torch-free to read. M documents
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_bipe.errors import DataError
from megatron_bipe.io import write_atomically
from megatron_bipe.text_table import csv_text
from megatron_bipe.types import IntArray

if TYPE_CHECKING:
    from megatron_bipe.eval.extrapolation import Subset

DOCUMENTS_NAME = "documents.csv"
_COLUMNS = ("subset", "model", "length_tokens", "document", "nats", "num_predictions")
FloatArray = npt.NDArray[np.float64]


class LossSums(NamedTuple):
    """Loss of one model at one length."""

    nats_M: FloatArray
    """Sum of the losses of each document's predictions."""
    counts_M: IntArray
    """Number of predictions of each document."""

    @property
    def nats_per_token(self) -> float:
        return float(self.nats_M.sum() / self.counts_M.sum())


def write_documents(folder: Path, subsets: Sequence["Subset"]) -> Path:
    """Write one row for each subset, model, length and document; an existing file is replaced."""
    rows: list[Sequence[object]] = [_COLUMNS]
    for subset in subsets:
        for results in subset.models:
            for losses in results.losses:
                known = (subset.name, results.model, losses.length_tokens)
                sums = zip(losses.nats_MQ.sum(1).tolist(), losses.counts_MQ.sum(1).tolist(), strict=True)
                rows += [(*known, document, nats, count) for document, (nats, count) in enumerate(sums)]
    path = folder / DOCUMENTS_NAME
    write_atomically(path, csv_text(rows).encode())
    return path


def read_documents(path: Path) -> dict[int, LossSums]:
    """Read the losses of the only model on the only subset of a file, by length, ascending.

    Raises:
        DataError: the file is missing or damaged, or has more than one model or subset.
    """
    found: dict[int, list[tuple[float, int]]] = {}
    models = set()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                models.add((row["subset"], row["model"]))
                found.setdefault(int(row["length_tokens"]), []).append(
                    (float(row["nats"]), int(row["num_predictions"]))
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"cannot be read: {error}") from error
    counts = {len(rows) for rows in found.values()}
    if len(models) != 1 or len(counts) != 1:
        raise _damaged(path, f"has {len(models)} models and {sorted(counts)} documents, not one model with equal ones")
    return {length: LossSums(*map(np.array, zip(*found[length], strict=True))) for length in sorted(found)}


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"the file {what}", remedy="Remove it, and evaluate the model again", location=path)
