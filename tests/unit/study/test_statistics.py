"""Means, deviations, and paired differences whose intervals cover seeds and documents."""

import math

import numpy as np
import pytest

from megatron_bipe.errors import DataError
from megatron_bipe.eval.document_losses import LossSums
from megatron_bipe.study.statistics import OverSeeds, paired_difference
from tests.helpers.errors import raises

COUNTS = np.array([10, 30, 0, 60])


def sums(*nats: float) -> LossSums:
    return LossSums(np.array(nats), COUNTS)


def test_over_seeds_has_mean_sample_deviation_and_extremes() -> None:
    found = OverSeeds((1.0, 2.0, 4.0))
    assert found.mean == pytest.approx(7 / 3)
    assert found.deviation == pytest.approx(math.sqrt((16 / 9 + 1 / 9 + 25 / 9) / 2))
    assert found.extremes == (1.0, 4.0)
    assert OverSeeds((2.0,)).deviation is None


def test_difference_is_per_predicted_token_over_common_seeds() -> None:
    ours = {1: sums(20, 60, 0, 120), 2: sums(30, 90, 0, 180), 5: sums(900, 900, 0, 900)}
    reference = {2: sums(20, 60, 0, 120), 1: sums(20, 30, 0, 100), 3: sums(1, 1, 0, 1)}
    found = paired_difference(ours, reference)
    assert found is not None
    assert found.nats == pytest.approx((50 + 100) / 2 / 100)
    assert (found.num_seeds, found.num_documents) == (2, 3)
    assert found.low < found.nats < found.high


def test_difference_that_is_equal_everywhere_has_an_interval_of_no_width() -> None:
    reference = {seed: sums(20 + seed, 60, 0, 120) for seed in (1, 2)}
    ours = {seed: LossSums(losses.nats_M + 0.5 * COUNTS, COUNTS) for seed, losses in reference.items()}
    found = paired_difference(ours, reference)
    assert found is not None and found.excludes_zero
    assert (found.low, found.nats, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_interval_covers_what_varies_with_seeds_and_what_varies_with_documents() -> None:
    zero = {seed: sums(0, 0, 0, 0) for seed in (1, 2, 3)}
    by_seed = paired_difference({seed: LossSums(seed * 1.0 * COUNTS, COUNTS) for seed in zero}, zero)
    by_document = paired_difference({seed: sums(10, 60, 0, 180) for seed in zero}, zero)
    both = paired_difference({seed: LossSums(seed * np.array([10, 60, 0, 180.0]), COUNTS) for seed in zero}, zero)
    assert by_seed and by_document and both
    assert (by_seed.low, by_seed.high) == pytest.approx((1.0, 3.0))
    assert (by_document.low, by_document.high) == pytest.approx((1.0, 3.0), abs=0.2)
    assert (both.high - both.low) / both.nats > 1.1 * (by_seed.high - by_seed.low) / by_seed.nats


def test_interval_agrees_with_the_variance_that_independent_effects_have() -> None:
    """A seed's effect and a document's effect add up, so their variances do, and both are resampled."""
    random = np.random.default_rng(3)
    num_seeds, num_documents = 40, 200
    effects = random.normal(0, 1, num_seeds)[:, None] + random.normal(0, 2, num_documents)
    counts = np.full(num_documents, 7)
    zero = {seed: LossSums(np.zeros(num_documents), counts) for seed in range(num_seeds)}
    found = paired_difference({seed: LossSums(7 * effects[seed], counts) for seed in zero}, zero)
    assert found is not None
    expected = 2 * 1.96 * math.sqrt(1 / num_seeds + 4 / num_documents)
    assert found.high - found.low == pytest.approx(expected, rel=0.25)


def test_difference_without_a_common_seed_is_none() -> None:
    assert paired_difference({1: sums(1, 1, 0, 1)}, {2: sums(1, 1, 0, 1)}) is None


def test_difference_of_other_documents_is_an_error() -> None:
    other = LossSums(np.array([1.0, 1, 1]), np.array([10, 30, 60]))
    with raises(DataError, "rope with seed 1", 100, 4, 3):
        paired_difference({1: sums(1, 1, 0, 1)}, {1: other}, ("bipe_rope", "rope"))
