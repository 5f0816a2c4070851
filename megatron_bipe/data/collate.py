"""From windows on disk to a batch of tensors: the only file of `data` that knows torch."""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_bipe.data.segments import bilevel_ids
from megatron_bipe.types import Batch, BoolArray, IntArray, TokenArray


class SequenceSource(Protocol):
    """A dataset, or a blend of several."""

    def sequences(self, indices_B: IntArray, seq_len_tokens: int, /) -> tuple[TokenArray, BoolArray]:
        """Tokens [B, T + 1] and segment ends [B, T] of windows by number."""
        ...

    def answers(self, indices_B: IntArray, /) -> IntArray | None:
        """Labels [first, stop) of each window that count in the loss, int64 [B, 2]; None: all of all."""
        ...


def label_weight(source: SequenceSource, indices_B: IntArray, seq_len_tokens: int) -> float:
    """What a label that counts weighs, so that the weighted mean over all labels is the mean over those that count.

    With the windows of a global batch it is the same for all its micro-batches, on whatever ranks they are, and follows
    from lengths alone: nothing is asked of other ranks, and nothing in the averages over them changes.

    Args:
        source: where the windows are.
        indices_B: all windows that the mean is over.
        seq_len_tokens: T.
    """
    answers_B2 = source.answers(indices_B)
    if answers_B2 is None:
        return 1.0
    return len(answers_B2) * seq_len_tokens / int(np.diff(answers_B2).sum())


def make_batch(
    source: SequenceSource, indices_B: IntArray, seq_len_tokens: int, clip: int, weight: float = 1.0
) -> Batch[torch.Tensor]:
    """Read windows and work out both ids of every token.

    Args:
        source: where from.
        indices_B: sequence numbers, from `sequence_indices` of its order.
        seq_len_tokens: T.
        clip: largest intra id (rows of the intra table, minus one).
        weight: of a label that counts, where not all do.

    Returns:
        Int64 tensors [B, T] on the CPU, and weights where not all labels count.

    Raises:
        DataError: the dataset is shorter than a window, or damaged.
    """
    tokens, ends = source.sequences(indices_B, seq_len_tokens)
    intra, inter = bilevel_ids(ends, clip)
    # Two copies rather than two views of one: contiguous rows, and torch has no uint16 embedding look-up.
    inputs, labels = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
    answers_B2 = source.answers(indices_B)
    weights = () if answers_B2 is None else (_weights(answers_B2, seq_len_tokens, weight),)
    return Batch(*(torch.from_numpy(array) for array in (inputs, intra, inter, labels, *weights)))


def _weights(answers_B2: IntArray, seq_len_tokens: int, weight: float) -> npt.NDArray[np.float32]:
    """Fp32 [B, T]: `weight` within the answers, 0 elsewhere."""
    place_T = np.arange(seq_len_tokens)
    counts_BT = (answers_B2[:, :1] <= place_T) & (place_T < answers_B2[:, 1:])
    return counts_BT * np.float32(weight)
