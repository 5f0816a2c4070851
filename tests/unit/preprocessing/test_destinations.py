"""Splits depend on the text alone and have the requested shares; of equal texts the first is kept."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from megatron_bipe.errors import DataError
from preprocessing import destinations
from preprocessing.destinations import (
    SPLIT_EXAMPLE,
    Split,
    are_duplicates_marked,
    has_hashes,
    hash_rows,
    load_duplicates,
    mark_duplicates,
    save_hashes,
    text_hash,
)
from tests.helpers.errors import raises


def test_split_shares_are_kept() -> None:
    split = Split.parse("train=0.9,valid=0.06,test=0.04")
    found = [split.choose(text_hash(f"text {n}")) for n in range(20_000)]
    shares = [found.count(name) / len(found) for name in ("train", "valid", "test")]
    assert shares == pytest.approx([0.9, 0.06, 0.04], abs=0.007)  # four standard deviations of the largest


def test_split_smallest_and_largest_hash_have_a_split() -> None:
    split = Split.parse(SPLIT_EXAMPLE)
    assert split.choose(bytes(16)) == "train"
    assert split.choose(b"\xff" * 16) == "test"
    half = Split.parse("a=0.5,b=0.5")
    assert [half.choose(number.to_bytes(8, "little") + bytes(8)) for number in (2**63 - 2**11, 2**63)] == ["a", "b"]


def test_split_never_changes() -> None:
    split = Split.parse("a=0.5,b=0.5")
    assert "".join(split.choose(text_hash(str(n))) for n in range(12)) == "aababbbbaaab"


@pytest.mark.parametrize(
    ("text", "observed"),
    [
        ("", "''"),
        ("train", "'train'"),
        ("train=", "'train='"),
        ("train=0.9", "0.9"),
        ("train=0.9,valid=0.2", "0.9, 0.2"),
        ("a=0,b=1", "0.0, 1.0"),
        ("a=0.5,a=0.5", "a, a"),
        ("../x=1", "../x"),
        ("A=1", " A "),
        ("a=nan", "nan"),
        ("tokenizer=1", "tokenizer"),
        ("unfinished=1", "unfinished"),
    ],
)
def test_split_invalid_text_is_an_error(text: str, observed: str) -> None:
    with raises(DataError, observed, location="--split", remedy="train=0.99"):
        Split.parse(text)


@pytest.mark.parametrize("rows_a_round", [1, 7, 1000])
def test_mark_duplicates_keeps_the_first_of_each_text(tmp_path: Path, rows_a_round: int) -> None:
    numbers = np.random.default_rng(0).integers(0, 60, size=(5, 30))
    texts = [[f"text {n}" for n in row] for row in numbers]
    texts[2] = []
    folders = [tmp_path / str(n) for n in range(5)]
    for folder, part in zip(folders, texts, strict=True):
        assert not has_hashes(folder)
        save_hashes(folder, [hash_rows(part[:9]), hash_rows(part[9:])])
        assert has_hashes(folder) and not are_duplicates_marked(folder)
    seen: set[str] = set()
    expected = [[text in seen or seen.add(text) is not None for text in part] for part in texts]
    with mock.patch.object(destinations, "_find_repeats", wraps=destinations._find_repeats) as repeats:
        assert mark_duplicates(folders, rows_a_round) == sum(map(sum, expected))
    assert repeats.call_count == -(-120 // rows_a_round)
    assert [load_duplicates(folder).tolist() for folder in folders] == expected


def test_find_repeats_rows_that_share_half_a_hash_are_different() -> None:
    rows = np.array([[1, 2], [1, 3], [2, 3], [3, 1], [1, 2], [1, 2]], dtype=np.uint64)
    assert destinations._find_repeats(rows).tolist() == [False] * 4 + [True] * 2
