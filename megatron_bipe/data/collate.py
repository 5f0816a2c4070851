"""Construction of tensor batches from the sequences of a dataset; the only file of `data` that imports torch."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_bipe.data.segments import bilevel_ids
from megatron_bipe.types import Batch, BoolArray, IntArray, TokenArray


class SequenceSource(Protocol):
    """A dataset, or a blend of several."""

    def sequences(self, indices_B: IntArray, seq_len_tokens: int, /) -> tuple[TokenArray, BoolArray]:
        """Return tokens [B, T + 1] and segment ends [B, T] of sequences by number."""

    def answers(self, indices_B: IntArray, /) -> IntArray | None:
        """Return the labels [first, stop) of each sequence that count in the loss, int64 [B, 2]; None if all count."""


def label_weight(source: SequenceSource, indices_B: IntArray, seq_len_tokens: int) -> float:
    """Return the weight of a counted label that makes the mean over all labels the mean over the counted labels.

    Computed over a global batch, it is the same for all its micro-batches on all ranks. It follows from lengths alone,
    so that it needs no communication, and the averages over ranks need no change.

    Args:
        source: dataset or blend that holds the sequences.
        indices_B: all sequences that the mean is over.
        seq_len_tokens: T.
    """
    answers_B2 = source.answers(indices_B)
    if answers_B2 is None:
        return 1.0
    return len(answers_B2) * seq_len_tokens / int(np.diff(answers_B2).sum())


def make_batch(
    source: SequenceSource, indices_B: IntArray, seq_len_tokens: int, clip: int, weight: float = 1.0
) -> Batch[torch.Tensor]:
    """Read sequences and compute both ids of every token.

    Args:
        source: dataset or blend to read from.
        indices_B: sequence numbers, from `sequence_indices` of the sample order.
        seq_len_tokens: T.
        clip: largest intra id (rows of the intra embedding, minus one).
        weight: weight of a label that counts, if not all do.

    Returns:
        Int64 tensors [B, T] on the CPU, and weights if not all labels count.

    Raises:
        DataError: the dataset is damaged or shorter than a sequence.
    """
    tokens, ends = source.sequences(indices_B, seq_len_tokens)
    intra, inter = bilevel_ids(ends, clip)
    # Two copies instead of two views of one array: rows are contiguous, and torch has no uint16 embedding lookup.
    inputs, labels = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
    answers_B2 = source.answers(indices_B)
    weights = () if answers_B2 is None else (_weights(answers_B2, seq_len_tokens, weight),)
    return Batch(*(torch.from_numpy(array) for array in (inputs, intra, inter, labels, *weights)))


def with_row_weights(batch: Batch[torch.Tensor], rows_B: npt.NDArray[np.float32]) -> Batch[torch.Tensor]:
    """Return the batch with the weights of its labels multiplied by one weight per sequence, fp32 [B]."""
    weights_BT = torch.ones(batch.labels_BT.shape) if batch.weights_BT is None else batch.weights_BT
    return batch._replace(weights_BT=weights_BT * torch.from_numpy(rows_B)[:, None])


def for_transfer(
    batch: Batch[torch.Tensor], pin: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.pin_memory
) -> Batch[torch.Tensor]:
    """Return the batch with int32 ids, half the bytes to transfer, in pinned memory, from which a GPU copies by itself.

    All ids are below 2 ** 31: a dataset stores tokens as int32 at most, and a sequence has fewer tokens than that.
    """
    fields = (x.int() if x.dtype == torch.int64 else x for x in batch if x is not None)
    return Batch(*map(pin, fields))


def _weights(answers_B2: IntArray, seq_len_tokens: int, weight: float) -> npt.NDArray[np.float32]:
    """Return fp32 weights [B, T]: `weight` within the answers, 0 elsewhere."""
    position_T = np.arange(seq_len_tokens)
    counts_BT = (answers_B2[:, :1] <= position_T) & (position_T < answers_B2[:, 1:])
    return counts_BT * np.float32(weight)
