"""Encode documents as token ids and segment ends, in bulk and without a Python object per token."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_bipe.data.segments import SegmentRule, fixed_length_ends, segment_ends
from megatron_bipe.data.shard import choose_dtype
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.types import BoolArray, Document, IntArray, TokenArray
from preprocessing.split import Split
from preprocessing.tokenizer_backend import CheckedBackend, Name, open_backend

HASH_BYTES = 16  # two texts of a corpus of 10^12 share one by chance once in 10^14 corpora


class Destination(NamedTuple):
    """Dataset that a document goes to."""

    split: str  # "" if the output is not split
    partition: str  # "" if the output is not partitioned


@dataclass(frozen=True)
class Recipe:
    """Options that determine a document's tokens and destination."""

    tokenizer_file: Path
    rule: SegmentRule
    special_in_text: bool = False
    append_eos: bool = False
    split: Split | None = None
    backend: Name = "stock"
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
        return self._recipe.split.of(text_hash(document.text)) if self._recipe.split else ""


def text_hash(text: str) -> bytes:
    """Return the hash that decides a text's split and identifies duplicates."""
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _ends(tokens_T: TokenArray, lengths_D: IntArray, rule: SegmentRule) -> BoolArray:
    """Return the segment ends of all documents in one pass; a counting rule restarts at each document."""
    if rule.fixed_length is None:
        return segment_ends(tokens_T, rule)
    bounds_D1 = np.concatenate([[0], np.cumsum(lengths_D)])
    return fixed_length_ends(bounds_D1, rule.fixed_length, 0, tokens_T.size)
