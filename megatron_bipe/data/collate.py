"""From windows on disk to a batch of tensors: the only file of `data` that knows torch."""

import numpy as np
import torch

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.segments import bilevel_ids
from megatron_bipe.types import Batch, IntArray


def make_batch(dataset: TokenDataset, indices_B: IntArray, seq_len_tokens: int, clip: int) -> Batch[torch.Tensor]:
    """Read windows and work out both ids of every token.

    Args:
        dataset: where from.
        indices_B: window numbers, from `SampleOrder.window_indices`.
        seq_len_tokens: T.
        clip: largest intra id (rows of the intra table, minus one).

    Returns:
        Four int64 tensors [B, T] on the CPU.

    Raises:
        DataError: the dataset is shorter than a window, or damaged.
    """
    tokens, ends = dataset.windows(indices_B, seq_len_tokens)
    intra, inter = bilevel_ids(ends, clip)
    # Two copies rather than two views of one: contiguous rows, and torch has no uint16 embedding look-up.
    inputs, labels = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
    return Batch(*(torch.from_numpy(array) for array in (inputs, intra, inter, labels)))
