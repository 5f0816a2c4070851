"""Encode documents as token ids and segment ends, in bulk, by gigatoken if it gives the stock library's ids.

The stock library (`tokenizers`, or `sentencepiece` for a bare tokenizer.model) defines the ids. The fast one is
compared with it before the run, on texts that are hard to tokenize and on the first texts of the input, and during the
run, on a sample. If they differ, the stock library encodes everything, or the run stops.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from megatron_bipe.data.segments import SegmentRule, fixed_length_ends, segment_ends
from megatron_bipe.data.shard import choose_dtype
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.types import BoolArray, Document, IntArray, TokenArray
from preprocessing.destinations import Destination, Split, text_hash

BackendName = Literal["gigatoken", "stock"]
BackendChoice = Literal["auto", "gigatoken", "stock"]
MOST_COMPARED_CHARS = 200_000  # of one text, unless more is due: the stock library is slow, more so for long texts
MARGIN_TOKENS = 64  # at each end of a piece: cutting a text changes the ids of the words around the cut
PIECE_STEP = 0.618  # of a text, from one piece to that of the next long text, so that pieces are from all parts
SHOWN_TOKENS = 5
HARD_TEXTS = (
    " leading",
    "   three  two trailing   ",
    "\n\n\tif x:\r\n\t\treturn  [ ]\r\n",
    "a .\nb . \u2581 . c",
    "e\u0301\u0302 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f469\u200d\U0001f680\U0001f1e9\U0001f1ea \u4e2d\u6587\u3000\u00a0x",
    "<s> <0x0A> </s>a<unk>",
    "a\x00b\ufeff1234567890",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Options that determine a document's tokens and destination."""

    tokenizer_file: Path
    rule: SegmentRule
    special_in_text: bool = False
    append_eos: bool = False
    split: Split | None = None
    backend: BackendName = "stock"
    check_share: float = 0.0  # of the text, checked against the stock tokenizer's ids


class TokenizedDocuments(NamedTuple):
    """D concatenated documents of T tokens in total."""

    tokens_T: TokenArray  # storage dtype
    ends_T: BoolArray
    lengths_D: IntArray  # tokens
    text_bytes_D: IntArray
    destinations: list[Destination]  # of each document


class DocumentTokenizer:
    """Tokenizer of documents according to a recipe; `dtype` is that of the stored tokens."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.backend = recipe.backend
        self._tokenizer: Tokenizer = load_tokenizer(recipe.tokenizer_file, recipe.special_in_text)
        self._backend: CheckedBackend = open_backend(
            self._tokenizer, recipe.backend, recipe.special_in_text, recipe.check_share
        )
        self.dtype = choose_dtype(self._tokenizer.vocab_size)

    def __call__(self, documents: Sequence[Document]) -> TokenizedDocuments:
        """Encode each document as BOS, its text, and EOS if the recipe appends it.

        Raises:
            TokenizerDifferenceError: the fast tokenizer gave wrong ids.
        """
        encoded = self._backend.encode_documents(documents)
        eos = [self._tokenizer.eos_id] if self._recipe.append_eos else []
        lengths_D = np.diff(encoded.offsets_D1) + 1 + len(eos)
        stops_D = np.cumsum(lengths_D)
        tokens_T = np.empty(int(lengths_D.sum()), self.dtype)
        is_text_T = np.ones(tokens_T.size, np.bool_)
        special = [(stops_D - lengths_D, self._tokenizer.bos_id), *((stops_D - 1, token) for token in eos)]
        for positions_D, token in special:
            tokens_T[positions_D] = token
            is_text_T[positions_D] = False
        tokens_T[is_text_T] = encoded.tokens_T
        return TokenizedDocuments(
            tokens_T=tokens_T,
            ends_T=_ends(tokens_T, lengths_D, self._recipe.rule),
            lengths_D=lengths_D,
            text_bytes_D=np.array([_utf8_bytes(document.text) for document in documents], dtype=np.int64),
            destinations=[Destination(self._split_of(document), document.partition) for document in documents],
        )

    def _split_of(self, document: Document) -> str:
        return self._recipe.split.choose(text_hash(document.text)) if self._recipe.split else ""


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _ends(tokens_T: TokenArray, lengths_D: IntArray, rule: SegmentRule) -> BoolArray:
    """Return the segment ends of all documents in one pass; a counting rule restarts at each document."""
    if rule.fixed_length is None:
        return segment_ends(tokens_T, rule)
    bounds_D1 = np.concatenate([[0], np.cumsum(lengths_D)])
    return fixed_length_ends(bounds_D1, rule.fixed_length, 0, tokens_T.size)


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

    Complete documents are compared if they have at most `MOST_COMPARED_CHARS`, or if the fraction asks for all of one;
    of other documents, pieces of that length are, from all parts of texts.
    """

    def __init__(self, fast: Backend, stock: Backend, share: float) -> None:
        self._fast, self._stock, self._share = fast, stock, share
        self._passed_chars = self._compared_chars = self._num_pieces = 0

    def encode_documents(self, documents: Sequence[Document]) -> Encoded:
        """Return the ids of each document's text.

        Raises:
            TokenizerDifferenceError: a document's ids differ from the stock library's.
        """
        encoded = self._fast.encode([document.text for document in documents])
        for number, document in enumerate(documents):
            self._passed_chars += len(document.text)
            pending = self._share * self._passed_chars - self._compared_chars
            if pending <= 0:
                continue
            found_T = encoded.tokens_T[encoded.offsets_D1[number] : encoded.offsets_D1[number + 1]]
            if len(document.text) > max(MOST_COMPARED_CHARS, pending) and self._has_piece(document.text, found_T):
                self._compared_chars += MOST_COMPARED_CHARS
            else:
                self._compared_chars += len(document.text)
                check_ids(document, found_T, self._stock)
        return encoded

    def _has_piece(self, text: str, found_T: TokenArray) -> bool:
        """Return True if the ids of a long text contain the stock ids of a piece of it.

        If not, only a comparison of all of the text shows whether the ids are wrong, or the cut changed more of them.
        """
        start = int(self._num_pieces * PIECE_STEP % 1 * (len(text) - MOST_COMPARED_CHARS))
        self._num_pieces += 1
        ids_T = self._stock.encode([text[start : start + MOST_COMPARED_CHARS]]).tokens_T
        inner_T = ids_T[MARGIN_TOKENS:-MARGIN_TOKENS].astype(found_T.dtype)
        return inner_T.size > 0 and inner_T.tobytes() in found_T.tobytes()


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
    tokenizer: Tokenizer, choice: BackendChoice, special_in_text: bool, first_documents: Sequence[Document]
) -> BackendName:
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


def open_backend(tokenizer: Tokenizer, name: BackendName, special_in_text: bool, share: float) -> CheckedBackend:
    stock = StockBackend(tokenizer)
    if name == "stock":
        return CheckedBackend(stock, stock, 0.0)
    return CheckedBackend(GigatokenBackend(tokenizer, special_in_text), stock, share)
