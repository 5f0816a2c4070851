"""The last layer.

B batch · T positions · D width · V vocabulary
"""

from torch import Tensor, nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory


class Head(nn.Module):
    """Final norm and projection to the vocabulary."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.norm = layers.norm(config.hidden_size, config.norm_eps)
        self.output = layers.output(config.hidden_size, config.vocab_size)

    def forward(self, payload: tuple[Tensor, Tensor]) -> Tensor:
        """(hidden [B, T, D], positions) -> logits [B, T, V] in the model's dtype; this rank's, where they are split."""
        hidden_BTD, _ = payload
        return self.output(self.norm(hidden_BTD))
