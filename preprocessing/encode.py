"""Documents -> token ids and segment ends, many at a time and no Python object a token."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_bipe.data.segmenter import fixed_ends
from megatron_bipe.data.segments import SegmentRule, segment_ends
from megatron_bipe.data.shard import choose_dtype
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.types import BoolArray, Document, IntArray, TokenArray
from preprocessing.split import Split
from preprocessing.tokenizer_backend import CheckedBackend, Name, open_backend

HASH_BYTES = 16  # two texts of a corpus of 10^12 share one by chance once in 10^14 corpora


class Destination(NamedTuple):
    """Which dataset a document goes to."""

    split: str  # "" where the output is not split
    partition: str  # "" where it is not partitioned


@dataclass(frozen=True)
class Recipe:
    """All that decides which tokens a document gives, and where they go."""

    tokenizer_file: Path
    rule: SegmentRule
    special_in_text: bool = False
    append_eos: bool = False
    split: Split | None = None
    backend: Name = "stock"
    check_share: float = 0.0  # of the text, compared with the stock tokenizer's ids


class TokenizedDocuments(NamedTuple):
    """D documents laid end to end, T tokens together."""

    tokens_T: TokenArray  # storage dtype
    ends_T: BoolArray
    lengths_D: IntArray  # tokens
    text_bytes_D: IntArray
    destinations: list[Destination]  # of each document


class DocumentTokenizer:
    """A recipe made ready.

    Args:
        recipe: what to do.

    Attributes:
        backend: that gives the ids.
        dtype: of the tokens as stored.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.backend = recipe.backend
        self._tokenizer: Tokenizer = load_tokenizer(recipe.tokenizer_file, recipe.special_in_text)
        self._backend: CheckedBackend = open_backend(
            self._tokenizer, recipe.backend, recipe.special_in_text, recipe.check_share
        )
        self.dtype = choose_dtype(self._tokenizer.vocab_size)

    def __call__(self, documents: Sequence[Document]) -> TokenizedDocuments:
        """Each document's BOS, its text, and EOS if asked for.

        Raises:
            TokenizerDifferenceError: the fast tokenizer was found to be wrong.
        """
        encoded = self._backend.encode_documents(documents)
        eos = [self._tokenizer.eos_id] if self._recipe.append_eos else []
        lengths_D = np.diff(encoded.offsets_D1) + 1 + len(eos)
        stops_D = np.cumsum(lengths_D)
        tokens_T = np.empty(int(lengths_D.sum()), self.dtype)
        is_text_T = np.ones(tokens_T.size, np.bool_)
        for places, token in [(stops_D - lengths_D, self._tokenizer.bos_id), *((stops_D - 1, token) for token in eos)]:
            tokens_T[places] = token
            is_text_T[places] = False
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
    """What tells two texts apart: decides the split, and finds duplicates."""
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _ends(tokens_T: TokenArray, lengths_D: IntArray, rule: SegmentRule) -> BoolArray:
    """Segment ends of all documents in one pass; a rule that counts starts again with each."""
    if rule.fixed_length is None:
        return segment_ends(tokens_T, rule)
    bounds_D1 = np.concatenate([[0], np.cumsum(lengths_D)])
    return fixed_ends(bounds_D1, rule.fixed_length, 0, tokens_T.size)
