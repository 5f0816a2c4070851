"""The loss over logits, without a second copy of them: they are read in parts, and their gradient takes their place.

`token_losses` is for whole rows of logits; `parallel.cross_entropy` puts the same two passes together over rows that
are split over ranks.

K tokens · V vocabulary (lower case: this rank's share)
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements that are looked at together, in fp32: what stays in a core's cache, or what fills a GPU.
_PART_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy in nats of every token, fp32 [B, T]; evaluation adds these up by its own protocol.

    Backward overwrites the logits with their gradient.
    """
    losses_K: Tensor = _TokenLosses.apply(logits_BTV.flatten(0, -2), labels_BT.flatten())
    return losses_K.view_as(labels_BT)


class RowSums(NamedTuple):
    """What a row's loss and gradient need of all its logits, fp32 [K] each."""

    highest_K: Tensor
    exps_K: Tensor  # sum of exp(logit - highest)
    labels_K: Tensor  # the label's logit - highest; 0 where it is not among these columns

    def losses(self) -> Tensor:
        """Cross-entropy in nats."""
        return self.exps_K.log() - self.labels_K


def sum_rows(logits_Kv: Tensor, columns_K: Tensor, highest_K: Tensor) -> RowSums:
    """The sums over the logits that are here.

    Args:
        logits_Kv: in any precision; sums are in fp32.
        columns_K: of the label; negative, or beyond the last one, where it is not here.
        highest_K: at least nearly the largest logit of the whole row, fp32.
    """
    exps, labels = [], []
    for part_Kv, columns, highest in _parts(logits_Kv, columns_K, highest_K):
        scores_Kv = part_Kv.float() - highest[:, None]
        here = (columns >= 0) & (columns < scores_Kv.shape[1])
        labels.append(scores_Kv.gather(1, columns.where(here, 0)[:, None])[:, 0] * here)
        exps.append(scores_Kv.exp_().sum(dim=1))
    return RowSums(highest_K, torch.cat(exps), torch.cat(labels))


def gradients_in_place(logits_Kv: Tensor, columns_K: Tensor, sums: RowSums, grad_K: Tensor) -> Tensor:
    """The logits, overwritten with their gradient: of each row, softmax less one at the label, times `grad_K`."""
    for part_Kv, columns, highest, exps, grad in _parts(logits_Kv, columns_K, sums.highest_K, sums.exps_K, grad_K):
        grad_Kv = (part_Kv.float() - highest[:, None]).exp_().mul_((grad / exps)[:, None])
        here = (columns >= 0) & (columns < grad_Kv.shape[1])
        grad_Kv.scatter_add_(1, columns.where(here, 0)[:, None], -(grad * here)[:, None])
        part_Kv.copy_(grad_Kv)
    return logits_Kv


def _parts(logits_Kv: Tensor, *vectors_K: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Runs of rows, small enough to be looked at together."""
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
