"""Segment bits made in chunks are those of complete documents."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspection.verify import Segmenter
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.data.segments import SegmentRule, fixed_length_ends
from megatron_bipe.errors import DataError
from tests.helpers.errors import raises

Write = Callable[..., Manifest]


@given(st.lists(st.integers(0, 12), max_size=12), st.integers(1, 9), st.data())
def test_fixed_ends_of_any_part_are_those_of_the_documents(
    lengths: list[int], length: int, data: st.DataObject
) -> None:
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    expected = np.array([(position + 1) % length == 0 for size in lengths for position in range(size)], dtype=np.bool_)
    start = data.draw(st.integers(0, expected.size))
    stop = data.draw(st.integers(start, expected.size))
    np.testing.assert_array_equal(fixed_length_ends(bounds, length, start, stop), expected[start:stop])


@pytest.mark.parametrize("vocab_size", [100, 70000])
def test_packed_ends_of_an_id_outside_the_vocabulary_is_refused_with_its_location(
    write_dataset: Write, tmp_path: Path, vocab_size: int
) -> None:
    write_dataset(tmp_path, [[[1, 2, 5, 4], [99, 3]]], vocab_size=vocab_size)
    shard = TokenDataset(tmp_path).shards[0]
    made = Segmenter(shard, SegmentRule(spec="[5]", token_ids=(5,)), vocab_size=100)
    assert made.packed_ends(shard.tokens(0, 6), 0).tolist() == [0b100]
    with raises(DataError, 12, 12 * shard.dtype.itemsize, 99, location="part-00000.bin"):
        Segmenter(shard, made.rule, vocab_size=99).packed_ends(shard.tokens(0, 6), 8)


def test_packed_ends_of_a_negative_id_is_refused(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, [[[1, 2]]], vocab_size=70000)
    shard = TokenDataset(tmp_path).shards[0]
    with raises(DataError, 1, 4, -2, 70000, location="part-00000.bin"):
        Segmenter(shard, SegmentRule(spec="[5]", token_ids=(5,)), 70000).packed_ends(np.array([1, -2], "<i4"), 0)
