"""Cross-entropy over a vocabulary that is split over ranks; the logits are never gathered.

B batch · T positions · v this rank's share of the vocabulary
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_bipe.parallel.collectives import all_reduce


def token_losses(logits_BTv: Tensor, labels_BT: Tensor, group: ProcessGroup) -> Tensor:
    """Cross-entropy in nats of every token, fp32 [B, T], the same on every rank.

    Args:
        logits_BTv: of this rank's contiguous share of the vocabulary; shares are equal.
        labels_BT: ids of the whole vocabulary.
        group: ranks that share the vocabulary, in its order.
    """
    return _TokenLosses.apply(logits_BTv, labels_BT, group)  # type: ignore[no-untyped-call]


class _TokenLosses(torch.autograd.Function):
    """log(sum of exp) less the label's logit; each needs one number a token from every rank."""

    @staticmethod
    def forward(ctx: Any, logits_BTv: Tensor, labels_BT: Tensor, group: ProcessGroup) -> Tensor:
        scores_BTv = logits_BTv.float()
        highest_BT = all_reduce(scores_BTv.amax(dim=-1), "max", group)
        scores_BTv = scores_BTv - highest_BT[..., None]
        local_BT = labels_BT - group.rank() * scores_BTv.shape[-1]
        mine_BT = (local_BT >= 0) & (local_BT < scores_BTv.shape[-1])
        local_BT = local_BT.where(mine_BT, 0)
        label_scores_BT = scores_BTv.gather(-1, local_BT[..., None])[..., 0] * mine_BT
        exps_BTv = scores_BTv.exp_()
        sums = torch.stack([exps_BTv.sum(dim=-1), label_scores_BT])
        total_BT, label_BT = all_reduce(sums, "sum", group)
        ctx.save_for_backward(exps_BTv, total_BT, local_BT, mine_BT)
        ctx.dtype = logits_BTv.dtype
        return total_BT.log() - label_BT

    @staticmethod
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None, None]:
        exps_BTv, total_BT, local_BT, mine_BT = ctx.saved_tensors
        grad_BTv = exps_BTv * (grad_BT / total_BT)[..., None]
        grad_BTv.scatter_add_(-1, local_BT[..., None], -(grad_BT * mine_BT)[..., None])
        return grad_BTv.to(ctx.dtype), None, None
