"""The loss over whole rows of logits; `parallel.cross_entropy` has it over split ones.

B batch · T positions · V vocabulary
"""

import torch.nn.functional as F
from torch import Tensor


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy in nats of every token, fp32 [B, T]; evaluation adds these up by its own protocol."""
    losses = F.cross_entropy(logits_BTV.flatten(0, -2).float(), labels_BT.flatten(), reduction="none")
    return losses.view_as(labels_BT)
