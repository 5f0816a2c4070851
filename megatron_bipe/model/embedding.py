"""Layer 0: tokens and intra-segment ids become the residual stream; the intra ids stop here.

B batch · T positions · D width (lower case: this rank's share)
"""

import torch
from torch import Tensor, nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layers import LayerFactory


class Embedding(nn.Module):
    """Token table plus, for the bilevel encodings, the learned absolute table of intra-segment places."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        unused_row = -1 if config.zero_last_row else None
        self._own = layers.windows.own
        self.token = layers.table(config.vocab_size, config.hidden_size, unused_row)
        self.intra = layers.small_table(config.intra_size, config.hidden_size, unused_row) if config.bilevel else None

    def forward(self, ids: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(tokens, intra ids, inter ids), each int64 [B, T] -> (hidden [B, t, D], positions int64 [B, T]).

        The positions are what attention encodes: inter-segment ids, or the token's place in the window. They are
        those of whole windows, since attention sees these.
        """
        tokens_BT, intra_BT, inter_BT = ids
        hidden_BtD = self.token(self._own(tokens_BT))
        if self.intra is not None:
            return hidden_BtD + self.intra(self._own(intra_BT)), inter_BT
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return hidden_BtD, places_T.expand_as(tokens_BT).contiguous()  # pipeline stages send no views
