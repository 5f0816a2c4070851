"""Evaluation protocols: how a corpus is split into sequences, independently of the model.

W sequences
"""

from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.errors import ConfigError, DataError
from megatron_bipe.types import IntArray

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


def cut_sequences(dataset: TokenDataset, num_tokens: int, length_tokens: int, protocol: Protocol) -> EvalSequences:
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
        limited = f" (of {dataset.num_tokens}, by --max-tokens)" if num_tokens < dataset.num_tokens else ""
        rule = (
            f"of {length_tokens} tokens and its last label need {length_tokens + 1}"
            if protocol != "reference"
            else f"of {length_tokens} tokens under the reference protocol needs a group of {2 * length_tokens}"
        )
        raise DataError(
            f"there are {num_tokens} tokens{limited} to evaluate on; one sequence {rule}",
            remedy="Use shorter --lengths, or more text",
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
