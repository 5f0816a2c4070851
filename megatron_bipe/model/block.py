"""Layers 1 to L: one transformer block.

B batch · T positions · D width
"""

from torch import Tensor, nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.activation_checkpointing import Recompute, recomputing
from megatron_bipe.model.attention import Attention
from megatron_bipe.model.layer_factory import LayerFactory
from megatron_bipe.model.mlp import SwiGLU
from megatron_bipe.model.positions.base import SharedTables


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerFactory,
        recompute: Recompute = "none",
        tables: SharedTables | None = None,
    ) -> None:
        super().__init__()
        self._run = recomputing(self._residuals, recompute)
        self.attention_norm = layers.norm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layers, tables)
        self.mlp_norm = layers.norm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config, layers)

    def forward(self, payload: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(hidden [B, T, D], positions int64 [B, T]) -> the same, positions untouched."""
        hidden_BTD, positions_BT = payload
        return self._run(hidden_BTD, positions_BT), positions_BT

    def _residuals(self, hidden_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD), positions_BT)
        return hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD))
