"""Statistics over seeds and documents: mean, deviation, and paired differences with bootstrap intervals.

S seeds · M documents · R resamples
"""

import math
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from megatron_bipe.errors import DataError
from megatron_bipe.eval.document_losses import FloatArray, LossSums
from megatron_bipe.types import IntArray

NUM_RESAMPLES = 2000
INTERVAL = 0.95
METHOD = (
    f"The interval is the {INTERVAL:.0%} percentile interval of {NUM_RESAMPLES:,} resamples that draw seeds and "
    "documents with replacement, independently of each other, since all seeds are evaluated on the same documents "
    "(Owen 2007, The pigeonhole bootstrap)."
)


class OverSeeds(NamedTuple):
    """Values of one member at one length, one per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1); None for a single seed, NaN if a seed has diverged."""
        if len(self.values) == 1:
            return None
        return stdev(self.values) if all(map(math.isfinite, self.values)) else math.nan

    @property
    def extremes(self) -> tuple[float, float]:
        return min(self.values), max(self.values)


class Difference(NamedTuple):
    """Mean difference of two members' losses at one length, in nats per token, over the seeds that both have."""

    nats: float
    low: float
    high: float
    num_seeds: int
    num_documents: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_difference(
    losses: Mapping[int, LossSums], reference: Mapping[int, LossSums], names: tuple[str, str] = ("", "")
) -> Difference | None:
    """Compare two members at one length, seed by seed and document by document.

    Args:
        losses: of one member, by seed.
        reference: of the member that is subtracted, by seed.
        names: of both, for the error.

    Returns:
        The difference with its interval; None if no seed is in both.

    Raises:
        DataError: the documents of two evaluations differ.
    """
    seeds = [seed for seed in losses if seed in reference]
    if not seeds:
        return None
    counts_M = losses[seeds[0]].counts_M
    for seed in seeds:
        for name, sums in zip(names, (losses[seed], reference[seed]), strict=True):
            if not np.array_equal(sums.counts_M, counts_M):
                raise DataError(
                    f"{name} with seed {seed} was evaluated on {sums.counts_M.sum()} predictions in "
                    f"{sums.counts_M.size} documents, and {names[0]} with seed {seeds[0]} on {counts_M.sum()} in "
                    f"{counts_M.size}, or on others of equal number; differences need the same ones",
                    remedy="Remove the folder of its evaluation, and run the study again",
                    location=name,
                )
    nats_SM = np.stack([losses[seed].nats_M - reference[seed].nats_M for seed in seeds])
    low, high = np.quantile(_resampled(nats_SM, counts_M), ((1 - INTERVAL) / 2, (1 + INTERVAL) / 2))
    mean = nats_SM.sum() / (len(seeds) * counts_M.sum())
    return Difference(float(mean), float(low), float(high), len(seeds), int((counts_M > 0).sum()))


def _resampled(nats_SM: FloatArray, counts_M: IntArray) -> FloatArray:
    """Return the difference per token in each resample [R]; the draws are the same for equal numbers of both."""
    num_seeds, num_documents = nats_SM.shape
    generator = np.random.default_rng(0)
    times_RS = _draws(generator, num_seeds)
    times_RM = _draws(generator, num_documents)
    predictions_R = times_RM @ counts_M
    nats_R = np.einsum("rs,sm,rm->r", times_RS, nats_SM, times_RM, optimize=True)
    drawn = predictions_R > 0  # all documents of a resample may be without predictions
    return np.asarray(nats_R[drawn] / (num_seeds * predictions_R[drawn]))


def _draws(generator: np.random.Generator, size: int) -> FloatArray:
    """Return how often each of `size` items is drawn in each resample [R, size]."""
    return generator.multinomial(size, np.full(size, 1 / size), size=NUM_RESAMPLES).astype(np.float64)
