"""From windows on disk to a batch of tensors: the only file of `data` that knows torch."""

from typing import Protocol

import numpy as np
import torch

from megatron_bipe.data.segments import bilevel_ids
from megatron_bipe.types import Batch, BoolArray, IntArray, TokenArray


class WindowSource(Protocol):
    """A dataset, or a blend of several."""

    def windows(self, indices_B: IntArray, seq_len_tokens: int, /) -> tuple[TokenArray, BoolArray]:
        """Tokens [B, T + 1] and segment ends [B, T] of windows by number."""
        ...


def make_batch(source: WindowSource, indices_B: IntArray, seq_len_tokens: int, clip: int) -> Batch[torch.Tensor]:
    """Read windows and work out both ids of every token.

    Args:
        source: where from.
        indices_B: window numbers, from `window_indices` of its order.
        seq_len_tokens: T.
        clip: largest intra id (rows of the intra table, minus one).

    Returns:
        Four int64 tensors [B, T] on the CPU.

    Raises:
        DataError: the dataset is shorter than a window, or damaged.
    """
    tokens, ends = source.windows(indices_B, seq_len_tokens)
    intra, inter = bilevel_ids(ends, clip)
    # Two copies rather than two views of one: contiguous rows, and torch has no uint16 embedding look-up.
    inputs, labels = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
    return Batch(*(torch.from_numpy(array) for array in (inputs, intra, inter, labels)))
