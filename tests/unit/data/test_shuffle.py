"""The order of samples: a bijection that never changes and is the same for any split over ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bipe.data.shuffle import SampleOrder, permute

KEYS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4097])
def test_permute_all_indices_appear_exactly_once(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert sorted(permute(np.arange(size, dtype=np.uint64), size, key).tolist()) == list(range(size))


@given(st.integers(1, 5000), KEYS)
def test_permute_of_any_size_and_key_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size, dtype=np.uint64), size, key).tolist()) == list(range(size))


@given(st.integers(1, 2**62), KEYS, st.data())
def test_permute_one_index_equals_the_same_among_many(size: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=12))
    together = permute(np.array(indices, np.uint64).reshape(1, -1), size, key)
    assert together.shape == (1, len(indices))
    assert all(int(value) < size for value in together.ravel())
    assert len(set(together.ravel().tolist())) == len(set(indices))
    alone = [int(permute(np.array([index], np.uint64), size, key)[0]) for index in indices]
    assert together.ravel().tolist() == alone


def test_permute_of_known_input_never_changes() -> None:
    # Pinned: another order would silently change what a resumed run reads.
    assert permute(np.arange(10, dtype=np.uint64), 10, 7).tolist() == [9, 4, 2, 6, 0, 5, 1, 7, 3, 8]
    far = [406196541783, 925594741386, 961424336309, 274875984841]
    assert permute(np.arange(4, dtype=np.uint64), 2**40 - 3, 7).tolist() == far
    assert SampleOrder(1000, seed=1234).sequence_indices(997, 6).tolist() == [891, 892, 105, 919, 189, 391]


def test_permute_scatters_like_chance() -> None:
    size = 1 << 14
    shuffled = permute(np.arange(size, dtype=np.uint64), size, 3).astype(np.int64)
    assert abs(np.corrcoef(np.arange(size), shuffled)[0, 1]) < 0.03  # standard deviation 0.008
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.03
    assert np.count_nonzero(shuffled == np.arange(size)) < 8  # one is expected
    assert np.count_nonzero(np.diff(shuffled) == 1) < 8
    # Any 256 consecutive samples must come from the complete corpus: 16 stripes, chi-squared, 15 degrees of freedom.
    for first in range(0, size, 256):
        counts = np.bincount(shuffled[first : first + 256] // (size // 16), minlength=16)
        assert ((counts - 16.0) ** 2 / 16).sum() < 60


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_permute_of_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        permute(np.zeros(1, np.uint64), size, 0)


def test_permute_index_beyond_the_size_is_refused() -> None:
    with pytest.raises(IndexError, match=r"5.*5"):
        permute(np.array([5], np.uint64), 5, 0)


@given(st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 200), st.integers(0, 200))
def test_order_cut_anywhere_gives_the_same_samples(num_samples: int, seed: int, first: int, count: int) -> None:
    order = SampleOrder(num_samples, seed)
    together = order.sequence_indices(0, first + count)
    np.testing.assert_array_equal(order.sequence_indices(first, count), together[first:])
    assert together.dtype == np.int64
    one_by_one = [int(SampleOrder(num_samples, seed).sequence_indices(sample, 1)[0]) for sample in range(first + count)]
    assert one_by_one == together.tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_order_split_over_any_ranks_gives_a_step_the_same_samples(ranks: int) -> None:
    global_batch, order = 16, SampleOrder(1000, seed=5)
    share = global_batch // ranks
    for step in (0, 3, 62):  # step 62 spans two epochs
        expected = order.sequence_indices(step * global_batch, global_batch)
        parts = [order.sequence_indices(step * global_batch + rank * share, share) for rank in range(ranks)]
        np.testing.assert_array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("num_samples", [1, 2, 37, 1000])
def test_order_every_epoch_holds_every_sequence_once(num_samples: int) -> None:
    order = SampleOrder(num_samples, seed=9)
    for epoch in (0, 1, 5):
        assert sorted(order.sequence_indices(epoch * num_samples, num_samples).tolist()) == list(range(num_samples))


def test_order_epochs_and_seeds_differ() -> None:
    epochs = [SampleOrder(500, seed=1).sequence_indices(epoch * 500, 500).tolist() for epoch in range(4)]
    seeds = [SampleOrder(500, seed=seed).sequence_indices(0, 500).tolist() for seed in range(2, 6)]
    assert len({tuple(order) for order in epochs + seeds}) == 8


def test_order_far_into_a_huge_corpus_is_immediate() -> None:
    order = SampleOrder(2**50, seed=0)  # stored, it would take 8 PiB
    indices = order.sequence_indices(3 * 2**50 - 8, 16)
    assert indices.shape == (16,)
    assert 0 <= indices.min() <= indices.max() < 2**50


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, -1)])
def test_order_of_a_negative_range_is_refused(first: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"{count}.*{first}"):
        SampleOrder(10, 0).sequence_indices(first, count)


def test_order_over_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=" 0 "):
        SampleOrder(0, 0)
