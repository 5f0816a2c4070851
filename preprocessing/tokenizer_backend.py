"""Bulk tokenization by gigatoken if it gives the stock library's ids, else by the stock library.

The stock library (`tokenizers`, or `sentencepiece` for a bare tokenizer.model) defines the ids. The fast one is
compared with it before the run, on texts that are hard to tokenize and on the first texts of the input, and during the
run, on a sample.
"""

import json
import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.types import Document, IntArray, TokenArray
from preprocessing.tokenizer_check import HARD_TEXTS

Name = Literal["gigatoken", "stock"]
Choice = Literal["auto", "gigatoken", "stock"]
MOST_COMPARED_CHARS = 200_000  # of one text: the stock library is slow, and more so for long texts
SHOWN_TOKENS = 5

log = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """Ids of D concatenated texts (T tokens), without BOS or EOS."""

    tokens_T: TokenArray
    offsets_D1: IntArray  # start of each text, and the end of the last


class Backend(Protocol):
    """Interface of a tokenizer that encodes many texts on one core."""

    def encode(self, texts: Sequence[str]) -> Encoded: ...


class TokenizerDifferenceError(DataError):
    """Difference between the ids of the fast and the stock tokenizer."""


class StockBackend:
    """Backend that uses the library for which the tokenizer's file was made."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Encoded:
        parts = self._tokenizer.encode_batch(texts)
        offsets_D1 = np.cumsum([0, *(part.size for part in parts)], dtype=np.int64)
        return Encoded(np.concatenate([np.empty(0, np.int32), *parts]), offsets_D1)


class GigatokenBackend:
    """Backend that uses gigatoken on the calling thread.

    Raises:
        DataError: gigatoken is not installed, or does not support this kind of tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, special_in_text: bool) -> None:
        try:
            from gigatoken.gigatoken_rs import load_hf_json

            spec = json.loads(tokenizer.to_json())
            if not special_in_text:  # without them, a literal "<s>" is ordinary text
                spec["added_tokens"] = [token for token in spec.get("added_tokens", []) if not token.get("special")]
            self._encode_batch = load_hf_json(json.dumps(spec)).encode_batch
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust code is not an Exception
            raise DataError(
                f"gigatoken cannot take this tokenizer: {error}",
                remedy="Install gigatoken if it is missing, or use the default --backend",
                location=tokenizer.definition,
            ) from error

    def encode(self, texts: Sequence[str]) -> Encoded:
        layout = self._encode_batch(list(texts), parallel=False).layout
        return Encoded(np.asarray(layout.content.data), np.asarray(layout.offsets.data))


class CheckedBackend:
    """Fast backend whose ids are compared with the stock ones for a fraction of the text.

    Complete documents are compared, of at most `MOST_COMPARED_CHARS`.
    """

    def __init__(self, fast: Backend, stock: Backend, share: float) -> None:
        self._fast, self._stock, self._share = fast, stock, share
        self._passed_chars = self._compared_chars = 0

    def encode_documents(self, documents: Sequence[Document]) -> Encoded:
        """Return the ids of each document's text.

        Raises:
            TokenizerDifferenceError: a document's ids differ from the stock library's.
        """
        encoded = self._fast.encode([document.text for document in documents])
        for number, document in enumerate(documents):
            self._passed_chars += len(document.text)
            pending = self._share * self._passed_chars - self._compared_chars
            if pending > 0 and len(document.text) <= MOST_COMPARED_CHARS:
                self._compared_chars += len(document.text)
                found_T = encoded.tokens_T[encoded.offsets_D1[number] : encoded.offsets_D1[number + 1]]
                check_ids(document, found_T, self._stock)
        return encoded


def check_ids(document: Document, found_T: TokenArray, stock: Backend) -> None:
    """Raise `TokenizerDifferenceError` if ids differ from the stock library's."""
    expected_T = stock.encode([document.text]).tokens_T
    if np.array_equal(found_T, expected_T):
        return
    shorter = min(found_T.size, expected_T.size)
    differs = np.flatnonzero(found_T[:shorter] != expected_T[:shorter])
    position = int(differs[0]) if differs.size else shorter
    around = slice(max(position - 1, 0), position + SHOWN_TOKENS)
    raise TokenizerDifferenceError(
        f"gigatoken and the stock tokenizer disagree from token {position} on: {found_T[around].tolist()} and "
        f"{expected_T[around].tolist()}, in the document that begins {document.text[:60]!r}",
        remedy="Run again with --backend stock, or with --on-difference fall-back, and report this",
        location=f"{document.file}, line {document.line}",
    )


def choose_backend(
    tokenizer: Tokenizer, choice: Choice, special_in_text: bool, first_documents: Sequence[Document]
) -> Name:
    """Return the backend that a run uses.

    "auto" takes gigatoken if it is available and agrees on the hard texts and the first documents.

    Raises:
        DataError: gigatoken was requested and cannot be used.
    """
    if choice == "stock":
        return "stock"
    added = [str(token["content"]) for token in json.loads(tokenizer.to_json()).get("added_tokens", [])]
    hard = [*HARD_TEXTS, "".join(f"{token}x {token} " for token in added)]
    documents = [Document(text, "texts built in for this check", n, "") for n, text in enumerate(hard, start=1)]
    try:
        fast = GigatokenBackend(tokenizer, special_in_text)
        checked = CheckedBackend(fast, StockBackend(tokenizer), share=1.0)
        checked.encode_documents([*documents, *first_documents])
    except DataError as error:
        if choice == "gigatoken":
            raise
        log.warning("Tokenizing with the stock library, which is slower. %s", error)
        return "stock"
    return "gigatoken"


def open_backend(tokenizer: Tokenizer, name: Name, special_in_text: bool, share: float) -> CheckedBackend:
    stock = StockBackend(tokenizer)
    if name == "stock":
        return CheckedBackend(stock, stock, 0.0)
    return CheckedBackend(GigatokenBackend(tokenizer, special_in_text), stock, share)
