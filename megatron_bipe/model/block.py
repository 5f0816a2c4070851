"""Layers 1 to L: one transformer block.

B batch · T positions · D width
"""

from torch import Tensor, nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.attention import Attention
from megatron_bipe.model.layers import LayerFactory
from megatron_bipe.model.mlp import SwiGLU
from megatron_bipe.model.norm import RMSNorm


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layers)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config, layers)

    def forward(self, payload: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(hidden [B, T, D], positions int64 [B, T]) -> the same, positions untouched."""
        hidden_BTD, positions_BT = payload
        hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD), positions_BT)
        hidden_BTD = hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD))
        return hidden_BTD, positions_BT
