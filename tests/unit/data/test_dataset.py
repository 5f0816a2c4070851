"""Sequences over shards against plain lists, and refused inputs."""

import pickle
import resource
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.data.segments import SegmentRule, bilevel_ids
from megatron_bipe.errors import DataError
from tests.helpers.errors import raises

Write = Callable[..., Manifest]
SHARDS = [[[1, 2, 5, 5, 7], [1]], [], [[1, 5]], [[], [1, 9, 9, 5, 3, 3, 3, 3, 5, 4, 4]], [[1, 8, 5]]]
FLAT = [token for documents in SHARDS for ids in documents for token in ids]

shard_lists = st.lists(st.lists(st.lists(st.integers(0, 9), max_size=25), max_size=4), min_size=1, max_size=5)


@settings(max_examples=50)
@given(shards=shard_lists, vocab_size=st.sampled_from([100, 70_000]), data=st.data())
def test_dataset_any_slice_equals_the_concatenation(
    write_dataset: Write, shards: list[list[list[int]]], vocab_size: int, data: st.DataObject
) -> None:
    flat = [token for documents in shards for ids in documents for token in ids]
    lengths = [len(ids) for documents in shards for ids in documents]
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), shards, vocab_size=vocab_size)
        dataset = TokenDataset(folder)
        assert dataset.num_tokens == len(flat)
        tokens = dataset.tokens(start, stop)
        assert tokens.dtype == (np.uint16 if vocab_size == 100 else np.int32)
        assert tokens.tolist() == flat[start:stop]
        assert dataset.ends(start, stop).tolist() == [token == 5 for token in flat[start:stop]]
        assert dataset.document_bounds().tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]


@settings(max_examples=60)
@given(shards=shard_lists, seq_len=st.integers(1, 40), data=st.data())
def test_dataset_sequences_equal_a_plain_loop(
    write_dataset: Write, shards: list[list[list[int]]], seq_len: int, data: st.DataObject
) -> None:
    flat = [token for documents in shards for ids in documents for token in ids]
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), shards)
        dataset = TokenDataset(folder)
        if len(flat) <= seq_len:
            with raises(DataError, len(flat), seq_len, seq_len + 1, location=folder):
                dataset.sequences(np.zeros(1, np.int64), seq_len)
            return
        count = dataset.num_sequences(seq_len)
        assert count == (len(flat) - 1) // seq_len
        indices = [*data.draw(st.lists(st.integers(0, count - 1), max_size=6)), count - 1]
        tokens, ends = dataset.sequences(np.array(indices, np.int64), seq_len)
        expected = [flat[i * seq_len : i * seq_len + seq_len + 1] for i in indices]
        assert tokens.tolist() == expected
        assert ends.tolist() == [[token == 5 for token in row[:-1]] for row in expected]
        intra, inter = bilevel_ids(ends, clip=1023)
        assert not intra[:, 0].any() and not inter[:, 0].any()


def test_dataset_sequences_of_an_epoch_cover_every_token_once(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, SHARDS)
    dataset = TokenDataset(tmp_path)
    tokens, _ = dataset.sequences(np.arange(dataset.num_sequences(4)), 4)
    assert tokens[:, :-1].ravel().tolist() == FLAT[: 4 * len(tokens)]
    assert tokens[:, 1:].ravel().tolist() == FLAT[1 : 4 * len(tokens) + 1]


def test_dataset_fixed_rule_counts_from_the_start_of_the_sequence(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, SHARDS, rule=SegmentRule(spec="fixed:3", token_ids=()))
    dataset = TokenDataset(tmp_path)
    assert dataset.ends(0, 8).tolist() == [False, False, True, False, False, False, False, False]
    _, ends = dataset.sequences(np.array([0, 1, 2]), 5)
    assert ends.tolist() == [[False, False, True, False, False]] * 3


def test_dataset_sequences_across_shards_start_at_zero(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, SHARDS)
    tokens, ends = TokenDataset(tmp_path).sequences(np.array([0]), 20)  # over all five shards
    assert tokens[0].tolist() == FLAT[:21]
    intra, inter = bilevel_ids(ends, clip=3)
    assert intra[0].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 3, 0, 1, 2]
    assert inter[0].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 5, 5, 5]


@pytest.mark.parametrize("seq_len", [1, 2, 4, 8])
def test_dataset_sequence_with_only_its_last_label_in_the_next_shard_has_it(
    write_dataset: Write, tmp_path: Path, seq_len: int
) -> None:
    write_dataset(tmp_path, [[range(10, 18)], [range(20, 28)], [[30]]])
    dataset = TokenDataset(tmp_path)
    tokens, _ = dataset.sequences(np.array([8 // seq_len - 1, 16 // seq_len - 1]), seq_len)
    assert tokens.tolist() == [[*range(18 - seq_len, 18), 20], [*range(28 - seq_len, 28), 30]]


@pytest.mark.parametrize(("num_tokens", "sequences"), [(9, 1), (16, 1), (17, 2)])
def test_dataset_num_sequences_needs_one_more_label(
    write_dataset: Write, tmp_path: Path, num_tokens: int, sequences: int
) -> None:
    write_dataset(tmp_path, [[[1] * num_tokens]])
    assert TokenDataset(tmp_path).num_sequences(8) == sequences


@pytest.mark.parametrize("shards", [[], [[]], [[[]]], [[[1] * 8]]])
def test_dataset_shorter_than_a_sequence_is_refused(write_dataset: Write, tmp_path: Path, shards: list) -> None:
    write_dataset(tmp_path, shards)
    dataset = TokenDataset(tmp_path)
    with raises(DataError, dataset.num_tokens, 8, 9, location=tmp_path, remedy="train.seq_len_tokens"):
        dataset.num_sequences(8)


def test_dataset_without_tokens_opens_and_is_empty(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, [[]])
    dataset = TokenDataset(tmp_path)
    assert dataset.tokens(0, 0).tolist() == [] and dataset.ends(0, 0).tolist() == []
    assert dataset.document_bounds().tolist() == [0]


@pytest.mark.parametrize("indices", [[-1], [0, 5]])
def test_dataset_sequence_outside_the_epoch_is_an_index_error(
    write_dataset: Write, tmp_path: Path, indices: list[int]
) -> None:
    write_dataset(tmp_path, SHARDS)
    with pytest.raises(IndexError, match="of 5"):
        TokenDataset(tmp_path).sequences(np.array(indices), 4)


def test_dataset_range_outside_is_an_index_error(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, SHARDS)
    for start, stop in [(-1, 1), (0, len(FLAT) + 1), (3, 2)]:
        with pytest.raises(IndexError, match=f"{len(FLAT)}$"):
            TokenDataset(tmp_path).tokens(start, stop)


def test_dataset_check_tokenizer_of_another_names_both(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, SHARDS)
    dataset = TokenDataset(tmp_path)
    dataset.check_tokenizer("a" * 64, "run")
    with raises(DataError, tmp_path, "a" * 64, "c" * 64, location="the run"):
        dataset.check_tokenizer("c" * 64, "the run")


def test_dataset_shard_of_another_type_than_the_manifest_says_is_refused(write_dataset: Write, tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, SHARDS)
    manifest.model_copy(update={"dtype": "int32"}).save(tmp_path)
    with raises(DataError, "dtype code", 17, "uint16", "int32", location="part-00000.idx"):
        TokenDataset(tmp_path)


def test_dataset_with_a_damaged_shard_is_refused_on_opening(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, SHARDS)
    (tmp_path / "part-00003.seg").unlink()
    with raises(DataError, location="part-00003.seg"):
        TokenDataset(tmp_path)


def test_dataset_shards_swapped_are_refused(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, SHARDS)
    (tmp_path / "part-00000.bin").replace(tmp_path / "x")
    (tmp_path / "part-00002.bin").replace(tmp_path / "part-00000.bin")
    (tmp_path / "x").replace(tmp_path / "part-00002.bin")
    with raises(DataError, 4, 12, location="part-00000.bin"):
        TokenDataset(tmp_path)


@pytest.mark.parametrize(("vocab_size", "token", "kind"), [(100, 100, "H"), (70_000, 70_000, "i"), (70_000, -1, "i")])
def test_dataset_token_outside_the_vocabulary_is_refused_with_its_byte(
    write_dataset: Write, tmp_path: Path, vocab_size: int, token: int, kind: str
) -> None:
    write_dataset(tmp_path, SHARDS, vocab_size=vocab_size)
    width = struct.calcsize(kind)
    path = tmp_path / "part-00003.bin"
    content = bytearray(path.read_bytes())
    content[7 * width : 8 * width] = struct.pack("<" + kind, token)
    path.write_bytes(content)
    with raises(DataError, 7, 7 * width, token, vocab_size, location=path):
        TokenDataset(tmp_path).sequences(np.arange(5), 4)


def test_dataset_opening_does_not_read_the_indices(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, SHARDS)
    path = tmp_path / "part-00003.idx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    dataset = TokenDataset(tmp_path)
    dataset.sequences(np.array([0, 1, 4]), 4)
    with raises(DataError, "document indices", location="part-00003.idx"):
        dataset.document_bounds()


def test_dataset_of_many_shards_raises_the_limit_on_open_files(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, [[[1] * 50]] * 40)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 5, hard))
        dataset = TokenDataset(tmp_path)
        assert dataset.sequences(np.arange(199), 10)[0].shape == (199, 11)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_dataset_pickled_after_use_carries_no_data(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, [[[1] * 5000]])
    dataset = TokenDataset(tmp_path)
    dataset.tokens(0, 5000)
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    assert pickle.loads(data).num_tokens == 5000
