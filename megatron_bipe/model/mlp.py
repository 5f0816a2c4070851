"""The feed-forward layer.

B batch · T positions · D width · F inner width (lower case: this rank's share)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), with gate and up in one matrix (gate rows first).

    Source: Shazeer 2020 (arXiv 2002.05202).
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.gate_up = layers.column(config.hidden_size, 2 * config.ffn_size, blocks=2)
        self.down = layers.row(config.ffn_size, config.hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Feed-forward output [B, T, D]."""
        return self.down(_Gate.apply(self.gate_up(hidden_BTD)))


class _Gate(torch.autograd.Function):
    """silu(gate) * up, the same bits as autograd's; keeps its input alone, and writes both gradients side by side."""

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
