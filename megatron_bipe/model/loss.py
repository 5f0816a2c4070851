"""Cross-entropy without a second copy of the logits: they are read in parts, and backward overwrites them in place.

`token_losses` takes full rows of logits; `parallel.vocab_parallel_loss` uses the same two passes for rows that are
sharded over ranks.

K tokens · V vocabulary (lower case: this rank's shard)
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# fp32 elements processed at a time: few enough for a core's cache, enough to fill a GPU.
_PART_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the cross-entropy in nats of every token, fp32 [B, T]; evaluation aggregates it by its own protocol.

    Backward overwrites the logits with their gradient.
    """
    losses_K: Tensor = _TokenLosses.apply(logits_BTV.flatten(0, -2), labels_BT.flatten())  # type: ignore[no-untyped-call]
    return losses_K.view_as(labels_BT)


class RowSums(NamedTuple):
    """Per-row statistics from which loss and gradient follow, fp32 [K] each."""

    highest_K: Tensor
    exps_K: Tensor  # sum of exp(logit - highest)
    labels_K: Tensor  # the label's logit - highest; 0 if the label is not among these columns

    def losses(self) -> Tensor:
        return self.exps_K.log() - self.labels_K


def sum_rows(logits_Kv: Tensor, columns_K: Tensor, highest_K: Tensor) -> RowSums:
    """Compute the sums over this rank's logits.

    Args:
        logits_Kv: logits in any precision; the sums are fp32.
        columns_K: column of each label; out of range if the label is on another rank.
        highest_K: approximate maximum of each full row, or more, fp32.
    """
    exps, labels = [], []
    for part_Kv, columns, highest in _parts(logits_Kv, columns_K, highest_K):
        scores_Kv = part_Kv.float() - highest[:, None]
        here = (columns >= 0) & (columns < scores_Kv.shape[1])
        labels.append(scores_Kv.gather(1, columns.where(here, 0)[:, None])[:, 0] * here)
        exps.append(scores_Kv.exp_().sum(dim=1))
    return RowSums(highest_K, torch.cat(exps), torch.cat(labels))


def gradients_in_place(logits_Kv: Tensor, columns_K: Tensor, sums: RowSums, grad_K: Tensor) -> Tensor:
    """Overwrite the logits with their gradient, (softmax - one-hot label) * `grad_K` for each row, and return them."""
    for part_Kv, columns, highest, exps, grad in _parts(logits_Kv, columns_K, sums.highest_K, sums.exps_K, grad_K):
        grad_Kv = (part_Kv.float() - highest[:, None]).exp_().mul_((grad / exps)[:, None])
        here = (columns >= 0) & (columns < grad_Kv.shape[1])
        grad_Kv.scatter_add_(1, columns.where(here, 0)[:, None], -(grad * here)[:, None])
        part_Kv.copy_(grad_Kv)
    return logits_Kv


def _parts(logits_Kv: Tensor, *vectors_K: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield contiguous slices of rows that are small enough to be processed at a time."""
    rows = max(1, _PART_ELEMENTS.get(logits_Kv.device.type, 2**20) // logits_Kv.shape[1])
    return zip(logits_Kv.split(rows), *(vector.split(rows) for vector in vectors_K), strict=True)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_KV: Tensor, labels_K: Tensor) -> Tensor:
        sums = sum_rows(logits_KV, labels_K, logits_KV.amax(dim=-1).float())
        ctx.save_for_backward(logits_KV, labels_K, *sums)
        return sums.losses()

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, None]:
        logits_KV, labels_K, *sums = ctx.saved_tensors
        return gradients_in_place(logits_KV, labels_K, RowSums(*sums), grad_K), None
