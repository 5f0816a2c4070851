"""A batch of tensors against the documents that it was made from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_bipe.data.collate import make_batch
from megatron_bipe.data.dataset import TokenDataset


def test_make_batch_holds_tokens_labels_and_both_ids(write_dataset: Callable[..., object], tmp_path: Path) -> None:
    write_dataset(tmp_path, [[[1, 2, 5, 3, 3, 3, 3]], [[1, 5, 5, 9, 8]]])
    batch = make_batch(TokenDataset(tmp_path), np.array([1, 0]), seq_len_tokens=5, clip=2)
    assert batch.tokens_BT.tolist() == [[3, 3, 1, 5, 5], [1, 2, 5, 3, 3]]
    assert batch.labels_BT.tolist() == [[3, 1, 5, 5, 9], [2, 5, 3, 3, 3]]
    assert batch.intra_BT.tolist() == [[0, 1, 2, 2, 0], [0, 1, 2, 0, 1]]
    assert batch.inter_BT.tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in batch[:4])
    batch.tokens_BT.add_(1)  # the tensors own their memory: the mapped files are read-only
