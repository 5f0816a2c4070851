"""Root-mean-square normalisation.

B batch · T positions · D width
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; no mean, no bias.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Same shape and dtype as the input."""
        return rms_norm(hidden_BTD, self.weight, self.eps)


def rms_norm(hidden_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Torch's norm, bit for bit; in fp32 inside.

    On a GPU torch has one kernel for it. On a CPU it is a chain of operations, of which autograd would keep two fp32
    copies of the input; here it keeps the input and one number a token.
    """
    if hidden_BTD.device.type == "cpu" and torch.is_grad_enabled():
        normed: Tensor = _RMSNorm.apply(hidden_BTD, weight_D, eps)
        return normed
    return F.rms_norm(hidden_BTD, weight_D.shape, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        exact_BTD = hidden_BTD.float()
        scale_BT1 = exact_BTD.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden_BTD, weight_D, scale_BT1)
        return (exact_BTD * scale_BT1).mul_(weight_D).to(hidden_BTD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_BTD, weight_D, scale_BT1 = ctx.saved_tensors
        normed_BTD, grad = hidden_BTD.float() * scale_BT1, grad_BTD.float()
        grad_weight_D = (grad * normed_BTD).flatten(0, -2).sum(dim=0)
        inner_BTD = grad * weight_D
        along_BT1 = (inner_BTD * normed_BTD).mean(dim=-1, keepdim=True)
        grad_hidden_BTD = inner_BTD.sub_(normed_BTD.mul_(along_BT1)).mul_(scale_BT1)
        return grad_hidden_BTD.to(hidden_BTD.dtype), grad_weight_D.to(weight_D.dtype), None
