"""Splits: by the text alone, in the shares asked for."""

import pytest

from megatron_bipe.errors import DataError
from preprocessing.encode import text_hash
from preprocessing.split import EXAMPLE, Split
from tests.helpers.errors import raises


def test_split_shares_are_kept() -> None:
    split = Split.parse("train=0.9,valid=0.06,test=0.04")
    found = [split.of(text_hash(f"text {n}")) for n in range(20_000)]
    shares = [found.count(name) / len(found) for name in ("train", "valid", "test")]
    assert shares == pytest.approx([0.9, 0.06, 0.04], abs=0.007)  # four standard deviations of the largest


def test_split_ends_of_the_range_have_a_place() -> None:
    split = Split.parse(EXAMPLE)
    assert split.of(bytes(16)) == "train"
    assert split.of(b"\xff" * 16) == "test"
    half = Split.parse("a=0.5,b=0.5")
    assert [half.of(place.to_bytes(8, "little") + bytes(8)) for place in (2**63 - 2**11, 2**63)] == ["a", "b"]


def test_split_is_fixed_for_ever() -> None:
    split = Split.parse("a=0.5,b=0.5")
    assert "".join(split.of(text_hash(str(n))) for n in range(12)) == "aababbbbaaab"


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
def test_split_that_is_none_is_an_error(text: str, observed: str) -> None:
    with raises(DataError, observed, location="--split", remedy="train=0.99"):
        Split.parse(text)
