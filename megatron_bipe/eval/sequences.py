"""Evaluation protocols: how a corpus is split into sequences, independently of the model.

W sequences

Torch-free, like the default options of the evaluation commands here, so that `--help` is fast.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.segments import sequence_ends
from megatron_bipe.errors import ConfigError, DataError
from megatron_bipe.types import BoolArray, IntArray, TokenArray

Protocol = Literal["full", "sliding", "reference"]
PROTOCOLS: dict[Protocol, str] = {
    "full": "sequences of L tokens, each with the next token as its last label, the last one shorter: every token but "
    "the first is predicted once, at every length; mean over predictions",
    "sliding": "sequences of L tokens, each L/2 after the one before, in which the first L/2 labels are context alone: "
    "every token but the first is predicted once, from at least L/2 tokens if as many come before it; mean over "
    "predictions",
    "reference": "the authors' protocol: documents in groups of 1000, each group's tokens cut into blocks of L, its "
    "remainder and one full block dropped; L - 1 predictions per block; mean over blocks",
}
DEFAULT_PROTOCOL: Protocol = "full"
EmptyTexts = Literal["keep", "drop"]
DEFAULT_EMPTY_TEXTS: EmptyTexts = "keep"  # as in the authors' script
NUM_AROUND = 2  # special tokens around a text: BOS, and EOS with --append-eos
EVAL_BATCH_TOKENS = 16_384  # per forward pass
PROMPT_BATCH_TOKENS = 65_536  # per generation batch, prompts and continuations
GROUP_DOCUMENTS = 1000  # batch size of `datasets.map` in the authors' script


class EvalSequences(NamedTuple):
    """Evaluation sequences in corpus order, int64 [W] each."""

    starts: IntArray
    """Corpus index of the sequence's first token."""
    num_inputs: IntArray
    """Number of tokens that the model reads."""
    num_context: IntArray
    """Number of leading labels that do not count."""
    num_predictions: IntArray
    """Number of labels that count, after the context."""

    @property
    def num_tokens(self) -> int:
        """Number of corpus tokens in any sequence, labels included."""
        reach = np.maximum(self.num_inputs, self.num_context + self.num_predictions + 1)
        overlap = np.maximum(0, (self.starts + reach)[:-1] - self.starts[1:])
        return int(reach.sum() - overlap.sum())


_NONE = EvalSequences(*(np.zeros(0, dtype=np.int64) for _ in EvalSequences._fields))


def parse_lengths(text: str) -> list[int]:
    """Parse `1024,2048` as [1024, 2048], ascending, each once; `1024..4096` is all multiples of 1024 up to 4096.

    Raises:
        ConfigError: a part is not a number of at least 2, or a range is empty.
    """
    parts = [length for part in text.split(",") for length in _multiples(part.strip())]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and int(part) >= 2)]
    if wrong:
        raise ConfigError(
            f"{', '.join(map(repr, wrong))} is not a sequence length: a whole number of tokens, 2 or more",
            remedy="Write --lengths 1024,2048,4096 or 1024..8192",
            location="--lengths",
        )
    return sorted(set(map(int, parts)))


def _multiples(text: str) -> list[str]:
    """Expand `8..32` to 8, 16, 24, 32; return anything else unchanged."""
    first, dots, last = text.partition("..")
    if not (dots and all(bound.isascii() and bound.isdigit() for bound in (first, last))):
        return [text]
    return [str(length) for length in range(int(first), int(last) + 1, int(first) or 1)] or [text]


class SelectedText:
    """Some documents of a dataset in their order, read as one text like a dataset of them alone."""

    def __init__(self, dataset: TokenDataset, starts_M: IntArray, lengths_M: IntArray) -> None:
        """Select the `lengths_M` tokens from `starts_M` on, for each document."""
        self.dataset, self.manifest, self.rule, self.path = dataset, dataset.manifest, dataset.rule, dataset.path
        self._starts_M = starts_M
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_M)])

    @property
    def num_tokens(self) -> int:
        return int(self._bounds[-1])

    @property
    def is_part_of_one(self) -> bool:
        """True if this is the beginning of a single document."""
        return self._starts_M.size == 1 and self._starts_M[0] + self.num_tokens not in self.dataset.document_bounds()

    def document_bounds(self) -> IntArray:
        """Return the first token of each document and the end of the last, int64 [documents + 1]."""
        return self._bounds

    def tokens(self, start: int, stop: int) -> TokenArray:
        return np.concatenate([self.dataset.tokens(*piece) for piece in self._pieces(start, stop)])

    def ends(self, start: int, stop: int) -> BoolArray:
        return np.concatenate([self.dataset.ends(*piece) for piece in self._pieces(start, stop)])

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the dataset's tokens that tokens [start, stop) of this text are, by document."""
        first, last = (int(np.searchsorted(self._bounds, index, side="right")) - 1 for index in (start, stop - 1))
        lows = np.maximum(self._bounds[first : last + 1], start)
        highs = np.minimum(self._bounds[first + 1 : last + 2], stop)
        shifts = self._starts_M[first : last + 1] - self._bounds[first : last + 1]
        return list(zip((lows + shifts).tolist(), (highs + shifts).tolist(), strict=True))


Text = TokenDataset | SelectedText


def select_text(dataset: TokenDataset, max_tokens: int | None, empty_texts: EmptyTexts = DEFAULT_EMPTY_TEXTS) -> Text:
    """Return the documents that an evaluation reads, the same ones for every model and length.

    Args:
        dataset: the dataset.
        max_tokens: read at most so many tokens: full documents that are spread evenly over the dataset, up to one that
            does not fit; if the first does not, its beginning is read. None: read all documents.
        empty_texts: "drop" skips the documents of empty texts, which are special tokens alone.

    Raises:
        ConfigError: `max_tokens` is not positive.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(
            f"--max-tokens {max_tokens} selects no tokens", remedy="Use 1 or more", location="--max-tokens"
        )
    is_complete = max_tokens is None or max_tokens >= dataset.num_tokens
    if is_complete and empty_texts == "keep":
        return dataset
    bounds = dataset.document_bounds()
    lengths = np.diff(bounds)
    documents = np.flatnonzero(lengths > 0)
    if empty_texts == "drop":
        documents = documents[~_are_empty(dataset, bounds, documents)]
    if is_complete and documents.size == lengths.size:
        return dataset
    if max_tokens is not None:
        fitting = _choose_fitting(documents, lengths, max_tokens)
        documents = fitting if fitting.size else documents[:1]
        lengths = np.minimum(lengths, max_tokens)
    return SelectedText(dataset, bounds[documents], lengths[documents])


def read_sequence(
    text: Text, start: int, num_inputs: int, num_tokens: int | None = None
) -> tuple[TokenArray, BoolArray]:
    """Read a sequence from a text.

    Args:
        text: the text.
        start: index of the first token.
        num_inputs: number of tokens that the model reads.
        num_tokens: number of tokens with all labels; None: one more than `num_inputs`.

    Returns:
        All tokens, int64, and the segment ends of the inputs.

    Raises:
        DataError: a token is outside the vocabulary.
    """
    tokens = text.tokens(start, start + (num_inputs + 1 if num_tokens is None else num_tokens)).astype(np.int64)
    vocab_size = text.manifest.tokenizer.vocab_size
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise DataError(
            f"the tokens from index {start} have an id outside the vocabulary of {vocab_size}",
            remedy="Check the dataset with tools/inspect_data.py verify",
            location=text.path,
        )
    return tokens, sequence_ends(text.ends(start, start + num_inputs), text.rule)


def bits_per_byte(text: Text, sequences: EvalSequences, total_nats: float) -> float | None:
    """Return the total loss in bits divided by the UTF-8 bytes of the text that was read.

    A manifest records the bytes of the full dataset. A part of it is taken to have as many bytes per token.

    Returns:
        None if the bytes are unknown, or if more tokens than the first one are read without a prediction.
    """
    dataset = text.dataset if isinstance(text, SelectedText) else text
    text_bytes, num_tokens = dataset.manifest.text_bytes, sequences.num_tokens
    if not text_bytes or sequences.num_predictions.sum() != num_tokens - 1:
        return None
    return total_nats / math.log(2) / (text_bytes * num_tokens / dataset.num_tokens)


def spread_order(count: int) -> IntArray:
    """Return the numbers below `count` in an order whose beginnings are all spread evenly over them.

    Source: Weyl's equidistribution of the multiples of the golden ratio, here in 64-bit integers.
    """
    return np.argsort(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15), kind="stable")


def _choose_fitting(documents: IntArray, lengths: IntArray, max_tokens: int) -> IntArray:
    """Return the first of the documents in `spread_order` that fit together, in ascending order.

    None after one that does not fit is taken, since that would favor short documents.
    """
    ordered = documents[spread_order(documents.size)]
    count = np.searchsorted(np.cumsum(lengths[ordered]), max_tokens, side="right")
    return np.sort(ordered[:count])


def _are_empty(dataset: TokenDataset, bounds: IntArray, documents: IntArray) -> BoolArray:
    """Return True for each of these documents that is special tokens alone."""
    special = [*dataset.manifest.tokenizer.special_ids.values()]
    empty = np.zeros(documents.size, np.bool_)
    for n in np.flatnonzero(np.diff(bounds)[documents] <= NUM_AROUND).tolist():
        first, stop = bounds[documents[n] : documents[n] + 2].tolist()
        empty[n] = np.isin(dataset.tokens(first, stop), special).all()
    return empty


def check_lengths(text: Text, lengths: Iterable[int], protocol: Protocol) -> None:
    """Raise the errors of `cut_sequences` for any of several lengths."""
    for length in lengths:
        cut_sequences(text, text.num_tokens, length, protocol)


def cut_sequences(dataset: Text, num_tokens: int, length_tokens: int, protocol: Protocol) -> EvalSequences:
    """Split the first `num_tokens` tokens of a dataset into sequences; the other tokens are ignored.

    Raises:
        ConfigError: the length is too short for a prediction.
        DataError: there is not one full sequence.
    """
    if length_tokens < 2:
        raise ConfigError(
            f"a sequence of {length_tokens} token(s) has no context to predict from",
            remedy="Use lengths of at least 2",
            location="--lengths",
        )
    if num_tokens <= length_tokens:  # also excludes lengths beyond int64
        sequences = _NONE
    elif protocol == "full":
        sequences = _cut_all(num_tokens, length_tokens, stride_tokens=length_tokens)
    elif protocol == "sliding":
        sequences = _cut_all(num_tokens, length_tokens, stride_tokens=length_tokens // 2)
    else:
        bounds = np.minimum(dataset.document_bounds(), num_tokens)
        sequences = _cut_in_groups(np.append(bounds[:-1:GROUP_DOCUMENTS], bounds[-1]), length_tokens)
    if not sequences.starts.size:
        total = dataset.dataset.num_tokens if isinstance(dataset, SelectedText) else dataset.num_tokens
        limited = f" (of {total}, by --max-tokens or --empty-texts)" if num_tokens < total else ""
        rule = (
            f"of {length_tokens} tokens and its last label need {length_tokens + 1}"
            if protocol != "reference"
            else f"of {length_tokens} tokens under the reference protocol needs a group of {2 * length_tokens}"
        )
        raise DataError(
            f"there are {num_tokens} tokens{limited} to evaluate on; one sequence {rule}",
            remedy=f"Use shorter --lengths, {'a larger --max-tokens, ' if limited else ''}or more text",
            location=dataset.path,
        )
    return sequences


def _cut_all(num_tokens: int, length_tokens: int, stride_tokens: int) -> EvalSequences:
    """Return sequences one stride apart; in all but the first, the overlap with the previous one is context."""
    num_labels, overlap = num_tokens - 1, length_tokens - stride_tokens
    starts = np.arange(0, max(num_labels - overlap, min(num_labels, 1)), stride_tokens, dtype=np.int64)
    num_inputs = np.minimum(length_tokens, num_labels - starts)
    num_context = np.where(starts > 0, overlap, 0)
    return EvalSequences(starts, num_inputs, num_context, num_inputs - num_context)


def _cut_in_groups(group_bounds: IntArray, length_tokens: int) -> EvalSequences:
    """Return the blocks of each group except its last full one, which the authors' code drops with the remainder."""
    starts = [np.zeros(0, dtype=np.int64)]
    for first, stop in pairwise(group_bounds.tolist()):
        num_blocks = max(0, (stop - first) // length_tokens - 1)
        starts.append(first + length_tokens * np.arange(num_blocks, dtype=np.int64))
    joined = np.concatenate(starts)
    # As in the authors' code, the model also reads the block's last token: dynamic RoPE scaling depends on the length.
    sizes = np.full_like(joined, length_tokens)
    return EvalSequences(joined, sizes, np.zeros_like(joined), sizes - 1)
