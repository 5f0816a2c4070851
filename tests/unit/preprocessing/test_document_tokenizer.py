"""Documents become ids, ends and destinations; the fast tokenizer gives the stock ids, or the difference is found."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bipe.data.segments import resolve_rule, segment_ends
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.types import BoolArray, Document, TokenArray
from preprocessing import document_tokenizer
from preprocessing.destinations import Destination, Split
from preprocessing.document_tokenizer import (
    CheckedBackend,
    DocumentTokenizer,
    Encoded,
    GigatokenBackend,
    Recipe,
    StockBackend,
    TokenizerDifferenceError,
    check_ids,
    choose_backend,
)
from tests.helpers.backends import Wrong
from tests.helpers.errors import raises
from tests.helpers.paths import LLAMA

CASES = {
    "empty": "",
    "space": " ",
    "leading spaces": "   x",
    "runs of spaces": "a    b  c   ",
    "tabs": "\t\tx\t y\t",
    "CR LF": "a\r\nb\r\n\r\n",
    "CR": "a\rb",
    "NUL": "a\x00b\x00",
    "control characters": "".join(map(chr, range(32))),
    "special tokens": "a<s>b</s> <unk> <s><s>",
    "special tokens of others": "<|endoftext|> [BOS] <pad>",
    "byte tokens spelled out": "<0x0A> <0x41>",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u0645\u0631\u062d\u0628\u0627",
    "combining": "e\u0301 a\u0308\u0323 \u0301",
    "joined emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
    "byte fallback": "\u2603\U0001f9ff\ue000\U0010ffff",
    "the space's own sign": "\u2581x \u2581 \u2581\u2581",
    "unusual spaces": "\u00a0x\u3000y\u200bz\u2028",
    "byte order mark": "\ufeffx",
    "replacement": "\ufffd",
    "one long word": "a" * 5000,
    "one long run of spaces": " " * 5000,
    "no spaces": "\u4e2d\u6587\u5b57" * 1000,
}


@pytest.fixture(scope="session", params=["trained here", "trained here, tokenizer.model", "published"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_folder: Path) -> Tokenizer:
    if request.param != "published":
        name = "tokenizer.model" if request.param.endswith(".model") else "tokenizer.json"
        return load_tokenizer(tokenizer_folder / name)
    if not LLAMA.exists():
        pytest.skip(reason="the LLaMA tokenizer is not next to the repository")
    return load_tokenizer(LLAMA)


@pytest.fixture(scope="session")
def fast(tokenizer: Tokenizer) -> GigatokenBackend:
    return GigatokenBackend(tokenizer, False)


@pytest.fixture(scope="session")
def stock(tokenizer: Tokenizer) -> StockBackend:
    return StockBackend(tokenizer)


def documents_of(*texts: str) -> list[Document]:
    return [Document(text, "f.jsonl", n, "") for n, text in enumerate(texts, start=1)]


def ids(encoded: Encoded) -> list[list[int]]:
    return [part.tolist() for part in np.split(encoded.tokens_T, encoded.offsets_D1[1:-1])]


def test_gigatoken_gives_the_stock_ids_in_every_hard_case(fast: GigatokenBackend, stock: StockBackend) -> None:
    found, expected = (ids(backend.encode(list(CASES.values()))) for backend in (fast, stock))
    wrong = [name for name, a, b in zip(CASES, found, expected, strict=True) if a != b]
    assert not wrong


@settings(max_examples=100)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_gigatoken_gives_the_stock_ids_of_any_text(
    fast: GigatokenBackend, stock: StockBackend, texts: list[str]
) -> None:
    assert ids(fast.encode(texts)) == ids(stock.encode(texts))


def test_gigatoken_special_in_text_gives_the_stock_ids(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder, special_in_text=True)
    texts = [CASES["special tokens"], "<s>", "x<s> <s>y </s>\n<unk>"]
    fast, stock = GigatokenBackend(tokenizer, True).encode(texts), StockBackend(tokenizer).encode(texts)
    assert ids(fast) == ids(stock)
    assert 1 in ids(fast)[0]


def test_gigatoken_document_of_50_megabytes_gets_the_stock_ids(tokenizer_folder: Path) -> None:
    """The stock library takes minutes for this; its ids for two, three and four copies determine those for many."""
    tokenizer = load_tokenizer(tokenizer_folder)
    passage = "".join(f"{n} words of a long text .\n\tand 'code' {n * n}\r\n" for n in range(2000))
    few = ids(StockBackend(tokenizer).encode([passage * count for count in (2, 3, 4)]))
    again = len(few[1]) - len(few[0])
    head, copy = few[0][:-again], few[0][-again:]
    assert few[1] == head + copy * 2 and few[2] == head + copy * 3
    count = 50_000_000 // len(passage) + 1
    fast = GigatokenBackend(tokenizer, False).encode([passage * count]).tokens_T
    np.testing.assert_array_equal(fast, np.concatenate([head, np.tile(copy, count - 1)]))


def test_choose_backend_uses_gigatoken_if_it_agrees(tokenizer: Tokenizer) -> None:
    assert choose_backend(tokenizer, "auto", False, documents_of("some text")) == "gigatoken"
    assert choose_backend(tokenizer, "stock", False, []) == "stock"


def test_choose_backend_that_disagrees_is_replaced_or_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(document_tokenizer, "GigatokenBackend", lambda tokenizer, special: Wrong(tokenizer))
    assert choose_backend(tokenizer, "auto", False, documents_of("fine")) == "gigatoken"
    assert choose_backend(tokenizer, "auto", False, documents_of("fine", "wrong here")) == "stock"
    assert "f.jsonl, line 2" in caplog.text
    with raises(TokenizerDifferenceError, "'wrong here'", location="f.jsonl, line 1", remedy="--backend stock"):
        choose_backend(tokenizer, "gigatoken", False, documents_of("wrong here"))


def test_choose_backend_unsupported_tokenizer_is_stock(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokenizer, "to_json", lambda: b'{"model": {"type": "Unheard"}}')
    assert choose_backend(tokenizer, "auto", False, []) == "stock"
    assert "gigatoken cannot take this tokenizer" in caplog.text
    with raises(DataError, "gigatoken", "Unheard", location=tokenizer.definition, remedy="--backend"):
        choose_backend(tokenizer, "gigatoken", False, [])


def test_choose_backend_without_gigatoken_is_stock(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gigatoken.gigatoken_rs", None)
    assert choose_backend(tokenizer, "auto", False, []) == "stock"


def test_checked_backend_compares_the_share_and_names_the_document(tokenizer: Tokenizer) -> None:
    texts = ["nothing to see in this text . " * 4] * 400
    texts[200] = "something is wrong in this text . " * 4
    with raises(TokenizerDifferenceError, "something is wrong", location="f.jsonl, line 201"):
        CheckedBackend(Wrong(tokenizer), StockBackend(tokenizer), 1.0).encode_documents(documents_of(*texts))
    counted = StockBackend(tokenizer)
    calls: list[int] = []
    counted.encode = lambda texts: calls.append(len(texts)) or StockBackend(tokenizer).encode(texts)  # type: ignore
    checked = CheckedBackend(StockBackend(tokenizer), counted, 0.1)
    for _ in range(8):
        checked.encode_documents(documents_of(*["the same length"] * 50))
    assert sum(calls) == pytest.approx(40, abs=1)
    CheckedBackend(Wrong(tokenizer), StockBackend(tokenizer), 0.0).encode_documents(documents_of(*texts[200:]))


PIECE_CHARS = 4000


@pytest.fixture
def compared(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> tuple[StockBackend, list[str]]:
    """The stock tokenizer, and the texts that it has encoded; long texts are those above `PIECE_CHARS`."""
    monkeypatch.setattr(document_tokenizer, "MOST_COMPARED_CHARS", PIECE_CHARS)
    stock, seen = StockBackend(tokenizer), []
    stock.encode = lambda texts: seen.extend(texts) or StockBackend(tokenizer).encode(texts)  # type: ignore
    return stock, seen


def a_book(number: int) -> str:
    return "".join(f"Chapter {number} {n}: the quick brown fox .\n" for n in range(800))


def test_checked_backend_pieces_of_long_texts_are_from_all_their_parts(
    tokenizer: Tokenizer, compared: tuple[StockBackend, list[str]]
) -> None:
    stock, seen = compared
    books = [a_book(n) for n in range(40)]
    checked = CheckedBackend(StockBackend(tokenizer), stock, 0.1)
    checked.encode_documents(documents_of(*books))
    starts = [book.index(piece) / len(book) for book in books for piece in seen if piece in book]
    assert len(starts) == len(seen) == pytest.approx(0.1 * sum(map(len, books)) / PIECE_CHARS, abs=2)
    assert set(map(len, seen)) == {PIECE_CHARS}
    assert {int(start * 4) for start in starts} == {0, 1, 2, 3}


def test_checked_backend_wrong_ids_of_a_long_text_are_found(
    tokenizer: Tokenizer, compared: tuple[StockBackend, list[str]]
) -> None:
    stock, _ = compared
    for book in (a_book(1).replace("quick", "wrong"), "a wrong word" + a_book(1)):
        share = 0.1 if book.startswith("Chapter") else 1.0  # all of it
        with raises(TokenizerDifferenceError, repr(book[:12])[:-1], location="f.jsonl, line 2"):
            CheckedBackend(Wrong(tokenizer), stock, share).encode_documents(documents_of("short", book))


def test_checked_backend_text_whose_pieces_have_other_ids_is_compared_in_full(
    tokenizer: Tokenizer, compared: tuple[StockBackend, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, seen = compared
    monkeypatch.setattr(document_tokenizer, "MARGIN_TOKENS", PIECE_CHARS)  # nothing is left of a piece
    book = a_book(1)
    CheckedBackend(StockBackend(tokenizer), stock, 0.1).encode_documents(documents_of(book))
    assert seen == [book[:PIECE_CHARS], book]


def test_check_ids_that_end_early_or_late_differ_from_there(stock: StockBackend) -> None:
    (document,) = documents_of("some words of a text")
    ids_T = stock.encode([document.text]).tokens_T
    check_ids(document, ids_T, stock)
    for found_T, place in ((ids_T[:-1], ids_T.size - 1), (np.append(ids_T, 7), ids_T.size)):
        with raises(TokenizerDifferenceError, place, "'some words", location="f.jsonl, line 1"):
            check_ids(document, found_T, stock)


# Documents


@pytest.fixture
def recipe(tokenizer_folder: Path) -> Recipe:
    tokenizer = load_tokenizer(tokenizer_folder)
    return Recipe(tokenizer.definition, resolve_rule("reference", tokenizer))


def numbered_documents(texts: list[str]) -> list[Document]:
    return [Document(text, "f.jsonl", n, f"p{n % 2}") for n, text in enumerate(texts)]


def tokenized(recipe: Recipe, texts: list[str]) -> list[tuple[TokenArray, BoolArray]]:
    done = DocumentTokenizer(recipe)(numbered_documents(texts))
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
    done = DocumentTokenizer(replace(recipe, split=split))(numbered_documents(texts)).destinations
    assert {found.partition for found in done} == {"p0", "p1"}
    assert {found.split for found in done} == {"a", "b"}
    assert [found.split for found in done[:40]] == [found.split for found in done[40:]]  # the same texts
    whole = DocumentTokenizer(recipe)(numbered_documents(["x"]))
    assert whole.destinations == [Destination("", "p0")]
