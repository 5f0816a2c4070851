"""The feed-forward layer.

B batch · T positions · D width · F inner width (lower case: this rank's share)
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layers import LayerFactory


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
        gate_BTf, up_BTf = self.gate_up(hidden_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTf) * up_BTf)
