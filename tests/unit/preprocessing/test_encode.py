"""Tokenizing documents: the ids, ends and destinations of each."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megatron_bipe.data.segments import resolve_rule, segment_ends
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.types import BoolArray, Document, TokenArray
from preprocessing.encode import Destination, DocumentTokenizer, Recipe
from preprocessing.split import Split


@pytest.fixture
def recipe(tokenizer_folder: Path) -> Recipe:
    tokenizer = load_tokenizer(tokenizer_folder)
    return Recipe(tokenizer.definition, resolve_rule("reference", tokenizer))


def documents_of(texts: list[str]) -> list[Document]:
    return [Document(text, "f.jsonl", n, f"p{n % 2}") for n, text in enumerate(texts)]


def tokenized(recipe: Recipe, texts: list[str]) -> list[tuple[TokenArray, BoolArray]]:
    done = DocumentTokenizer(recipe)(documents_of(texts))
    stops = np.cumsum(done.lengths_D)
    assert stops[-1] == done.tokens_T.size == done.ends_T.size
    np.testing.assert_array_equal(done.text_bytes_D, [len(text.encode()) for text in texts])
    spans = [slice(stop - size, stop) for stop, size in zip(stops, done.lengths_D, strict=True)]
    return [(done.tokens_T[span], done.ends_T[span]) for span in spans]


@pytest.mark.parametrize("backend", ["stock", "gigatoken"])
def test_tokenizer_gives_bos_then_the_stock_ids(recipe: Recipe, texts: list[str], backend: str) -> None:
    stock = tokenizers.Tokenizer.from_file(str(recipe.tokenizer_file))
    for (tokens_T, ends_T), text in zip(tokenized(replace(recipe, backend=backend), texts), texts, strict=True):
        assert tokens_T.dtype == np.uint16
        if "<s>" not in text:
            assert tokens_T.tolist() == stock.encode(text).ids  # its template adds BOS
        assert tokens_T.tolist().count(1) == 1  # no second BOS out of a literal "<s>"
        np.testing.assert_array_equal(ends_T, np.isin(tokens_T, recipe.rule.token_ids))


@pytest.mark.parametrize("backend", ["stock", "gigatoken"])
def test_tokenizer_special_in_text_makes_special_tokens(recipe: Recipe, texts: list[str], backend: str) -> None:
    third = tokenized(replace(recipe, special_in_text=True, backend=backend), texts)[2][0]
    assert third.tolist().count(1) == 1 + 3


def test_tokenizer_append_eos_ends_every_document(recipe: Recipe, texts: list[str]) -> None:
    with_eos = tokenized(replace(recipe, append_eos=True), texts)
    for (tokens_T, ends_T), (plain_T, plain_ends_T) in zip(with_eos, tokenized(recipe, texts), strict=True):
        assert tokens_T.tolist() == [*plain_T.tolist(), 2]
        assert ends_T.tolist() == [*plain_ends_T.tolist(), False]


def test_tokenizer_fixed_rule_counts_from_each_document(recipe: Recipe, texts: list[str]) -> None:
    rule = resolve_rule("fixed:3", load_tokenizer(recipe.tokenizer_file))
    for tokens_T, ends_T in tokenized(replace(recipe, rule=rule), texts):
        np.testing.assert_array_equal(ends_T, segment_ends(tokens_T, rule))
        assert ends_T[2::3].all()


def test_tokenizer_destinations_follow_from_partition_and_text(recipe: Recipe) -> None:
    split = Split.parse("a=0.5,b=0.5")
    texts = [str(n % 40) for n in range(80)]
    done = DocumentTokenizer(replace(recipe, split=split))(documents_of(texts)).destinations
    assert {found.partition for found in done} == {"p0", "p1"}
    assert {found.split for found in done} == {"a", "b"}
    assert [found.split for found in done[:40]] == [found.split for found in done[40:]]  # the same texts
    whole = DocumentTokenizer(recipe)(documents_of(["x"]))
    assert whole.destinations == [Destination("", "p0")]
