"""RMS norm and gate of eager blocks, with explicit backward passes that need less memory than autograd's.

Results have the same bits as those of torch's operations, and so do the gradients of the gate. The norm is for a CPU: a
GPU has a fused kernel for it.

B batch · T positions · D width · F feed-forward width (lower case: this rank's shard)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class GateFunction(torch.autograd.Function):
    """silu(gate) * up of [gate, up]; it saves only its input, and writes both gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up_BTf: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_BTf)
        gate_BTf, up_BTf = gate_up_BTf.chunk(2, dim=-1)
        return F.silu(gate_BTf).mul_(up_BTf)

    @staticmethod
    def backward(ctx: Any, grad_BTf: Tensor) -> Tensor:
        (gate_up_BTf,) = ctx.saved_tensors
        gate_BTf, up_BTf = gate_up_BTf.chunk(2, dim=-1)
        result_BTf = torch.empty_like(gate_up_BTf)
        for_gate_BTf, for_up_BTf = result_BTf.chunk(2, dim=-1)
        torch.mul(grad_BTf, F.silu(gate_BTf), out=for_up_BTf)
        for_gate_BTf.copy_(torch.ops.aten.silu_backward(grad_BTf * up_BTf, gate_BTf))
        return result_BTf


class RMSNormFunction(torch.autograd.Function):
    """RMS norm in fp32; it saves the input and one number per token, where autograd would save two fp32 copies."""

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
