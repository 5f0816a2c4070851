"""Cross-entropy over a vocabulary that is sharded over ranks, without gathering or copying the logits.

B batch · T positions · K tokens · v this rank's shard of the vocabulary
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_bipe.model.loss import RowSums, gradients_in_place, sum_rows
from megatron_bipe.parallel.collectives import all_reduce


def token_losses(logits_BTv: Tensor, labels_BT: Tensor, group: ProcessGroup) -> Tensor:
    """Return the cross-entropy in nats of every token, fp32 [B, T], the same on every rank.

    Backward overwrites the logits with their gradient.

    Args:
        logits_BTv: logits of this rank's contiguous shard of the vocabulary; all shards have the same size.
        labels_BT: ids of the full vocabulary.
        group: ranks that shard the vocabulary, in its order.
    """
    columns_K = labels_BT.flatten() - group.rank() * logits_BTv.shape[-1]
    losses_K: Tensor = _TokenLosses.apply(logits_BTv.flatten(0, -2), columns_K, group)  # type: ignore[no-untyped-call]
    return losses_K.view_as(labels_BT)


class _TokenLosses(torch.autograd.Function):
    """log(sum of exp) minus the label's logit; each of the two needs one number per token from every rank."""

    @staticmethod
    def forward(ctx: Any, logits_Kv: Tensor, columns_K: Tensor, group: ProcessGroup) -> Tensor:
        highest_K = all_reduce(logits_Kv.amax(dim=-1).float(), "max", group)
        here = sum_rows(logits_Kv, columns_K, highest_K)
        exps_K, labels_K = all_reduce(torch.stack([here.exps_K, here.labels_K]), "sum", group)
        sums = RowSums(highest_K, exps_K, labels_K)
        ctx.save_for_backward(logits_Kv, columns_K, *sums)
        return sums.losses()

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, None, None]:
        logits_Kv, columns_K, *sums = ctx.saved_tensors
        return gradients_in_place(logits_Kv, columns_K, RowSums(*sums), grad_K), None, None
