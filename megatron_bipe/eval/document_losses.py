"""Losses at one sequence length by document and by position in the sequence, with bootstrap intervals.

D documents · P equal parts of the sequence · R resamples
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.eval.eval_model import EvalModel
from megatron_bipe.eval.perplexity import FloatArray, Settings, limit_tokens, sequence_losses
from megatron_bipe.eval.sequences import cut_sequences
from megatron_bipe.types import IntArray

NUM_PLACES = 16
NUM_RESAMPLES = 1000
INTERVAL = 0.95
LEAST_DOCUMENTS = 2


class DocumentLosses(NamedTuple):
    """Sums over all predictions at one sequence length."""

    length_tokens: int
    nats_DP: FloatArray
    """Loss sums by document and sequence part of the predicted token."""
    counts_DP: IntArray
    """Number of predictions in each."""

    @property
    def perplexity(self) -> float:
        return _exp(self.nats_DP.sum() / self.counts_DP.sum())

    @property
    def by_place(self) -> list[tuple[float, float]]:
        """(middle of the sequence part in tokens, perplexity there), for parts with predictions."""
        nats_P, counts_P = self.nats_DP.sum(0), self.counts_DP.sum(0)
        width = self.length_tokens / NUM_PLACES
        return [
            ((position + 0.5) * width, _exp(nats_P[position] / counts_P[position]))
            for position in np.flatnonzero(counts_P).tolist()
        ]

    def interval(self) -> tuple[float, float] | None:
        """Return the central `INTERVAL` of the perplexities of resampled corpora.

        Each resample draws as many documents as the corpus has, with replacement; the draws are the same for every
        model and length. Return None if fewer than `LEAST_DOCUMENTS` have predictions.

        Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; percentile interval.
        """
        nats_D, counts_D = self.nats_DP.sum(1), self.counts_DP.sum(1)
        num_documents = len(counts_D)
        if np.count_nonzero(counts_D) < LEAST_DOCUMENTS:
            return None
        generator = np.random.default_rng(0)
        means = np.empty(NUM_RESAMPLES)
        for resample in range(NUM_RESAMPLES):
            times_D = np.bincount(generator.integers(num_documents, size=num_documents), minlength=num_documents)
            drawn = times_D @ counts_D
            means[resample] = times_D @ nats_D / drawn if drawn else np.nan
        low, high = np.nanquantile(means, ((1 - INTERVAL) / 2, (1 + INTERVAL) / 2))
        return _exp(low), _exp(high)


def evaluate_documents(
    eval_model: EvalModel,
    dataset: TokenDataset,
    length_tokens: int,
    settings: Settings,
    progress: Callable[[int], object] | None = None,
) -> DocumentLosses:
    """Run the model over all sequences of one length; arguments and errors as in `evaluate_perplexity`."""
    sequences = cut_sequences(dataset, limit_tokens(dataset, settings.max_tokens), length_tokens, settings.protocol)
    bounds = np.asarray(dataset.document_bounds())
    num_documents = len(bounds) - 1
    nats = np.zeros(num_documents * NUM_PLACES)
    counts = np.zeros(num_documents * NUM_PLACES, dtype=np.int64)
    for rows, losses_BP in sequence_losses(eval_model, dataset, sequences, settings, progress):
        offsets = sequences.num_context[rows[0]] + np.arange(losses_BP.shape[1])
        predicted_BP = sequences.starts[rows][:, None] + offsets + 1
        document_BP = np.searchsorted(bounds, predicted_BP, side="right") - 1
        part_P = offsets * NUM_PLACES // length_tokens
        cells = (document_BP * NUM_PLACES + part_P).ravel()
        nats += np.bincount(cells, losses_BP.ravel(), minlength=nats.size)
        counts += np.bincount(cells, minlength=counts.size)
    shape = (num_documents, NUM_PLACES)
    return DocumentLosses(length_tokens, nats.reshape(shape), counts.reshape(shape))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
