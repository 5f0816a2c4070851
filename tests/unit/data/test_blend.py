"""A blend of datasets: exact shares, separate epochs, and the same samples for any split over ranks."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bipe.config import DataConfig
from megatron_bipe.data.blend import PATTERN_SLOTS, Blend, count_slots, open_blend, spread
from megatron_bipe.data.collate import make_batch
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import DataRecord, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.shuffle import SampleOrder
from megatron_bipe.errors import ConfigError, DataError
from tests.helpers.errors import raises

SEQ, SEED = 8, 1234
NUM_WINDOWS = (5, 40, 300)
WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)
SHARES = st.tuples(*[st.floats(0.05, 1)] * 3)


def _write(write_dataset, folder, num_sequences, seed):
    tokens = np.random.default_rng(seed).integers(0, 100, num_sequences * SEQ + 1)
    write_dataset(folder, [[part.tolist()] for part in np.array_split(tokens, 2)])
    return TokenDataset(folder)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, write_dataset):
    folder = tmp_path_factory.mktemp("blend")
    return [_write(write_dataset, folder / f"set-{n}", count, n) for n, count in enumerate(NUM_WINDOWS)]


def _split(blend: Blend, sequences):
    """Return the dataset of each sequence, and its index there."""
    firsts = np.cumsum([0, *NUM_WINDOWS])[: len(blend.datasets)]
    member = np.searchsorted(firsts, sequences, side="right") - 1
    return member, sequences - firsts[member]


# The pattern


@settings(max_examples=50)
@given(WEIGHTS)
def test_slot_counts_are_the_shares_rounded_to_a_slot(weights):
    quotas = np.array(weights) / np.sum(weights) * PATTERN_SLOTS
    try:
        counts = count_slots(weights, range(len(weights)))
    except ConfigError:
        assert quotas.min() < 1
        return
    assert sum(counts) == PATTERN_SLOTS and min(counts) > 0
    assert np.abs(counts - quotas).max() < 1 + 1e-6


def test_slot_counts_of_integral_hundredths_of_a_percent_are_exact():
    assert count_slots([0.3, 0.6986, 0.0014], "abc") == (3000, 6986, 14)
    assert count_slots([30, 69.86, 0.14], "abc") == (3000, 6986, 14)
    assert count_slots([1, 1, 1], "abc") == (3334, 3333, 3333)
    assert count_slots([1e308, 1e308], "ab") == (5000, 5000)
    assert count_slots([1e-300], "a") == (PATTERN_SLOTS,)


def test_slot_counts_too_small_a_weight_names_it_its_share_and_the_least():
    too_small = ("data/b", "1e-05", "5e-06", "data/d", "1e-09", "5e-10")
    with raises(ConfigError, *too_small, "0.0001", location="data.path") as error:
        count_slots([1, 1e-5, 1, 1e-9], ["data/a", "data/b", "data/c", "data/d"])
    assert "data/a" not in str(error.value) and "data/c" not in str(error.value)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=10))
def test_spread_puts_every_slot_in_its_own_part_of_the_pattern(counts):
    pattern, total = spread(counts), sum(counts)
    assert pattern.shape == (total,)
    for member, count in enumerate(counts):
        slots = np.flatnonzero(pattern == member)
        numbers = np.arange(count)
        assert slots.size == count
        assert (slots >= numbers * total // count).all() and (slots * count < (numbers + 1) * total).all()


@settings(max_examples=30)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=25))
def test_spread_never_strays_a_sample_from_the_shares(counts):
    pattern, total = spread(counts), sum(counts)
    taken = (pattern[:, None] == np.arange(len(counts))).cumsum(axis=0)  # after 1, 2, ... slots
    wanted = np.arange(1, total + 1)[:, None] * np.array(counts) / total
    assert np.abs(taken - wanted).max() < 1


def test_spread_of_many_small_datasets_with_a_big_one_does_not_cluster_them():
    pattern = spread([790, *[10] * 21])
    assert max(np.diff(np.flatnonzero(pattern == 0))) <= 3


def test_spread_of_known_input_never_changes():
    # Pinned: another pattern would silently change what a resumed run reads.
    assert spread([3, 6, 1]).tolist() == [1, 0, 1, 1, 0, 1, 1, 0, 1, 2]


# The order


@settings(max_examples=10)
@given(SHARES, st.integers(0, 10**12))
def test_blend_any_pattern_of_samples_has_the_exact_shares(datasets, weights, first):
    blend = Blend(datasets, weights, SEQ, SEED)
    member, _ = _split(blend, blend.sequence_indices(first, PATTERN_SLOTS))
    assert tuple(np.bincount(member, minlength=3)) == blend.slots == count_slots(weights, "abc")


@settings(max_examples=25)
@given(SHARES, st.integers(0, 2**40), st.integers(0, 3))
def test_blend_an_epoch_of_each_dataset_holds_each_of_its_sequences_once(datasets, weights, seed, epoch):
    blend = Blend(datasets, weights, SEQ, seed)
    enough = 2 * max(-(-(epoch + 1) * n * PATTERN_SLOTS // s) for n, s in zip(NUM_WINDOWS, blend.slots, strict=True))
    member, sequences = _split(blend, blend.sequence_indices(0, enough))
    for position, count in enumerate(NUM_WINDOWS):
        own = sequences[member == position][epoch * count : (epoch + 1) * count]
        assert sorted(own.tolist()) == list(range(count))


@settings(max_examples=50)
@given(SHARES, st.integers(1, 3), st.integers(0, 100), st.integers(0, 200), st.data())
def test_blend_cut_anywhere_gives_the_same_samples(datasets, weights, cycle, before, count, data):
    blend = Blend(datasets, weights, SEQ, SEED)
    first = cycle * PATTERN_SLOTS - before  # mostly across the end of a pattern
    together = blend.sequence_indices(first, count)
    cut = data.draw(st.integers(0, count))
    parts = [blend.sequence_indices(first, cut), blend.sequence_indices(first + cut, count - cut)]
    np.testing.assert_array_equal(np.concatenate(parts), together)
    assert together.dtype == np.int64 and together.shape == (count,)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_blend_split_over_any_ranks_gives_a_step_the_same_samples(datasets, ranks):
    blend, batch = Blend(datasets, [1, 2, 4], SEQ, SEED), 16
    for step in (0, 624, 625, 10**9):  # step 625 starts the second pattern
        expected = blend.sequence_indices(step * batch, batch)
        share = batch // ranks
        parts = [blend.sequence_indices(step * batch + rank * share, share) for rank in range(ranks)]
        np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_blend_of_known_input_never_changes(datasets):
    # Pinned: another order would silently change what a resumed run reads.
    blend = Blend(datasets, [0.2, 0.3, 0.5], SEQ, SEED)
    assert blend.sequence_indices(9_995, 12).tolist() == [39, 83, 3, 17, 181, 60, 24, 299, 1, 104, 10, 68]


def test_blend_of_one_is_the_order_of_the_dataset_alone(datasets):
    for weights in (None, [0.3]):
        blend = Blend(datasets[2:], weights, SEQ, SEED)
        order = SampleOrder(NUM_WINDOWS[2], SEED)
        for first in (0, PATTERN_SLOTS - 3, 10**15):
            np.testing.assert_array_equal(blend.sequence_indices(first, 700), order.sequence_indices(first, 700))
        assert blend.record == datasets[2].manifest.record


def test_blend_of_equal_datasets_does_not_draw_the_same_sequences_from_both(datasets):
    blend = Blend([datasets[2]] * 2, [1, 1], SEQ, SEED)
    sequences = blend.sequence_indices(0, 200)
    first, second = sequences[sequences < 300], sequences[sequences >= 300] - 300
    assert np.count_nonzero(first == second) < 6


def test_blend_far_into_training_is_immediate(datasets):
    blend = Blend(datasets, None, SEQ, SEED)
    assert blend.sequence_indices(2**60, 16).shape == (16,)
    with pytest.raises(ValueError, match="from -1"):
        blend.sequence_indices(-1, 2)


def test_blend_without_weights_follows_the_tokens(datasets):
    blend = Blend(datasets, None, SEQ, SEED)
    assert blend.slots == count_slots([dataset.num_tokens for dataset in datasets], "abc")
    assert blend.slots[2] > 8 * blend.slots[1] * 0.9


# The sequences


def test_blend_sequences_are_those_of_the_datasets_in_the_requested_order(datasets):
    blend = Blend(datasets, [1, 1, 1], SEQ, SEED)
    indices = blend.sequence_indices(7, 64)
    tokens, ends = blend.sequences(indices, SEQ)
    for row, (member, window) in enumerate(zip(*_split(blend, indices), strict=True)):
        expected = datasets[member].sequences(np.array([window]), SEQ)
        np.testing.assert_array_equal(tokens[row], expected[0][0])
        np.testing.assert_array_equal(ends[row], expected[1][0])
    batch = make_batch(blend, indices, SEQ, clip=3)
    np.testing.assert_array_equal(batch.tokens_BT.numpy(), tokens[:, :-1])
    np.testing.assert_array_equal(batch.labels_BT.numpy(), tokens[:, 1:])


def test_blend_each_dataset_is_asked_once_a_batch(datasets, monkeypatch):
    asked = Counter()
    sequences = TokenDataset.sequences
    monkeypatch.setattr(
        TokenDataset, "sequences", lambda self, *args: (asked.update([self.path.name]), sequences(self, *args))[1]
    )
    blend = Blend(datasets, [1, 1, 1], SEQ, SEED)
    blend.sequences(blend.sequence_indices(0, 64), SEQ)
    assert asked == Counter({"set-0": 1, "set-1": 1, "set-2": 1})


def test_blend_no_sequences_are_an_empty_batch(datasets):
    tokens, ends = Blend(datasets, [1, 1, 1], SEQ, SEED).sequences(np.zeros(0, np.int64), SEQ)
    assert (tokens.shape, ends.shape) == ((0, SEQ + 1), (0, SEQ))


@pytest.mark.parametrize("indices", [[-1], [sum(NUM_WINDOWS)]])
def test_blend_missing_sequence_is_refused(datasets, indices):
    with pytest.raises(IndexError, match="of 345"):
        Blend(datasets, [1, 1, 1], SEQ, SEED).sequences(np.array(indices), SEQ)


def test_blend_sequences_of_another_length_are_refused(datasets):
    with pytest.raises(ValueError, match=r"4.*8"):
        Blend(datasets, [1, 1, 1], SEQ, SEED).sequences(np.array([0]), 4)


# Datasets that may be blended


def test_blend_of_another_tokenizer_or_rule_names_both_folders_and_values(datasets, tmp_path, write_dataset):
    other = TokenizerRecord(name="other", fingerprint="b" * 64, vocab_size=100, special_ids={})
    write_dataset(tmp_path / "other", [[[1] * 90]], tokenizer=other, rule=SegmentRule(spec="[6]", token_ids=(6,)))
    folders = (datasets[0].path, tmp_path / "other")
    with raises(DataError, *folders, "a" * 64, "b" * 64, "[5]", "[6]", location="data.path", remedy="--tokenizer"):
        Blend([datasets[0], TokenDataset(tmp_path / "other")], [1, 1], SEQ, SEED)


def test_blend_of_data_with_and_without_special_tokens_in_text_names_both(datasets, tmp_path, write_dataset):
    folders = [tmp_path / name for name in ("plain", "chat", "unknown")]
    for folder, special_in_text in zip(folders, (False, True, None), strict=True):
        write_dataset(folder, [[list(range(2, 60))]], special_in_text=special_in_text)
    plain, chat, unknown = map(TokenDataset, folders)
    for members in ([plain, chat], [unknown, chat, plain]):
        with raises(DataError, plain.path, chat.path, location="data.path", remedy="--special-in-text"):
            Blend(members, None, SEQ, SEED)
    assert Blend([unknown, chat], None, SEQ, SEED).record.special_in_text is True
    assert Blend([plain], None, SEQ, SEED).record.special_in_text is False
    assert Blend([unknown, *datasets], None, SEQ, SEED).record.special_in_text is None


def test_blend_with_a_dataset_shorter_than_a_sequence_names_it(datasets, tmp_path, write_dataset):
    for tokens in ([1] * SEQ, []):
        write_dataset(tmp_path / "short", [[tokens]])
        with raises(DataError, len(tokens), SEQ, SEQ + 1, location=tmp_path / "short", remedy="train.seq_len_tokens"):
            Blend([datasets[0], TokenDataset(tmp_path / "short")], None, SEQ, SEED)


def test_open_blend_takes_each_form_of_data_path(datasets):
    folders = [str(dataset.path) for dataset in datasets]
    forms = {(10_000,): folders[0], (2000, 3000, 5000): dict(zip(folders, (2, 3, 5), strict=True))}
    forms[count_slots([dataset.num_tokens for dataset in datasets], folders)] = folders
    for slots, path in forms.items():
        blend = open_blend(DataConfig(path=path), SEQ, SEED)
        assert blend.slots == slots
        assert [dataset.path for dataset in blend.datasets] == [Path(folder) for folder in folders[: len(slots)]]


# The record of a blend in a checkpoint


def test_record_of_a_blend_knows_members_order_and_slots(datasets, tmp_path, write_dataset):
    record = Blend(datasets, [2, 3, 5], SEQ, SEED).record
    assert [(member.path, member.fingerprint, member.slots) for member in record.blend] == [
        (str(dataset.path), dataset.manifest.fingerprint, slots)
        for dataset, slots in zip(datasets, (2000, 3000, 5000), strict=True)
    ]
    assert Blend(datasets, [0.2, 0.3, 0.5], SEQ, SEED).record == record
    changed = _write(write_dataset, tmp_path / "set-1", NUM_WINDOWS[1], seed=99)
    others = [
        Blend(datasets, [2, 3, 5.1], SEQ, SEED),
        Blend([datasets[1], datasets[0], datasets[2]], [3, 2, 5], SEQ, SEED),
        Blend([datasets[0], changed, datasets[2]], [2, 3, 5], SEQ, SEED),
        Blend(datasets[:2], [2, 3], SEQ, SEED),
    ]
    assert len({record.fingerprint, *(other.record.fingerprint for other in others)}) == 5
    assert DataRecord.model_validate_json(record.model_dump_json(exclude_defaults=True)) == record


def test_record_of_a_blend_does_not_depend_on_its_folders(datasets, tmp_path, write_dataset):
    moved = [_write(write_dataset, tmp_path / f"moved-{n}", count, n) for n, count in enumerate(NUM_WINDOWS)]
    here, there = (Blend(sets, [2, 3, 5], SEQ, SEED).record for sets in (datasets, moved))
    assert here.fingerprint == there.fingerprint
