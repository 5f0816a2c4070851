"""The last layer, and the loss on what it returns.

B batch · T positions · D width · V vocabulary
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layers import LayerFactory
from megatron_bipe.model.norm import RMSNorm


class Head(nn.Module):
    """Final norm and projection to the vocabulary."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.output = layers.output(config.hidden_size, config.vocab_size)

    def forward(self, payload: tuple[Tensor, Tensor]) -> Tensor:
        """(hidden [B, T, D], positions) -> logits [B, T, V] in the model's dtype."""
        hidden_BTD, _ = payload
        return self.output(self.norm(hidden_BTD))


def mean_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token, fp32 scalar."""
    return F.cross_entropy(logits_BTV.flatten(0, -2).float(), labels_BT.flatten())


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy in nats of every token, fp32 [B, T]; evaluation adds these up by its own protocol."""
    losses = F.cross_entropy(logits_BTV.flatten(0, -2).float(), labels_BT.flatten(), reduction="none")
    return losses.view_as(labels_BT)
