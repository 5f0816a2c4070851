"""Tokenizing blocks: the ids and ends of each document, and workers that change nothing or die."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megatron_bipe.data.segments import resolve_rule, segment_ends
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import DataError
from preprocessing import tokenize
from preprocessing.readers import Block, read_blocks
from preprocessing.tokenize import Recipe, TokenizedBlock, tokenize_block, tokenize_blocks


@pytest.fixture
def recipe(tokenizer_folder: Path) -> Recipe:
    tokenizer = load_tokenizer(tokenizer_folder)
    return Recipe(tokenizer.definition, resolve_rule("reference", tokenizer))


def die(recipe: Recipe, block: Block) -> TokenizedBlock:
    os._exit(7)


def test_tokenize_block_gives_bos_then_the_stock_ids(recipe: Recipe, inputs: dict[str, Path], texts: list[str]) -> None:
    (block,) = read_blocks(inputs["jsonl"])
    stock = tokenizers.Tokenizer.from_file(str(recipe.tokenizer_file))
    documents = list(tokenize_block(recipe, block).documents())
    assert len(documents) == len(texts)
    for document, text in zip(documents, texts, strict=True):
        assert document.tokens_T.dtype == np.uint16
        assert document.text_bytes == len(text.encode())
        if "<s>" not in text:
            assert document.tokens_T.tolist() == stock.encode(text).ids  # its template adds BOS
        assert document.tokens_T.tolist().count(1) == 1  # no second BOS out of a literal "<s>"
        np.testing.assert_array_equal(document.ends_T, np.isin(document.tokens_T, recipe.rule.token_ids))


def test_tokenize_block_special_in_text_makes_special_tokens(recipe: Recipe, inputs: dict[str, Path]) -> None:
    (block,) = read_blocks(inputs["jsonl"])
    third = list(tokenize_block(replace(recipe, special_in_text=True), block).documents())[2]
    assert third.tokens_T.tolist().count(1) == 1 + 3


def test_tokenize_block_fixed_rule_counts_from_each_document(recipe: Recipe, inputs: dict[str, Path]) -> None:
    (block,) = read_blocks(inputs["jsonl"])
    rule = resolve_rule("fixed:3", load_tokenizer(recipe.tokenizer_file))
    for document in tokenize_block(replace(recipe, rule=rule), block).documents():
        np.testing.assert_array_equal(document.ends_T, segment_ends(document.tokens_T, rule))
        assert document.ends_T[2::3].all()


def test_tokenize_block_without_documents_is_empty(recipe: Recipe) -> None:
    done = tokenize_block(recipe, Block("f.jsonl", 1, b'{"text": ""}\nbad\n', True, 3))
    assert done.tokens_T.dtype == np.uint16
    assert (list(done.documents()), done.num_empty, len(done.malformed)) == ([], 1, 1)


def test_tokenize_blocks_two_workers_give_the_same_in_order_and_read_ahead_is_bounded(
    recipe: Recipe, inputs: dict[str, Path]
) -> None:
    blocks = list(read_blocks(inputs["jsonl"], block_bytes=1)) * 8
    drawn = 0

    def counted() -> "list[Block]":
        nonlocal drawn
        for block in blocks:
            drawn += 1
            yield block

    single = list(tokenize_blocks(recipe, iter(blocks), 1))
    for number, (source, done) in enumerate(tokenize_blocks(recipe, counted(), 2)):
        assert drawn <= number + 2 + tokenize.BLOCKS_AHEAD * 2
        expected_source, expected = single[number]
        assert source == expected_source
        np.testing.assert_array_equal(done.tokens_T, expected.tokens_T)
        np.testing.assert_array_equal(done.ends_T, expected.ends_T)
    assert drawn == len(single) == number + 1


def test_tokenize_blocks_worker_that_dies_is_an_error(
    recipe: Recipe, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "tokenize_block", die)
    with pytest.raises(DataError, match="worker process died"):
        list(tokenize_blocks(recipe, read_blocks(inputs["jsonl"]), 2))
