"""Absolute parts of encodings: modules from positions int64 [B, t] to vectors added to the residual stream.

B batch · t this rank's positions · D width
"""

from torch import Tensor, nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory
from megatron_bipe.model.positions.functional import sinusoids


def learned(config: ModelConfig, layers: LayerFactory) -> nn.Module:
    """Make a learned embedding of positions: in the segment for BiPE, else in the sequence (Gehring et al. 2017)."""
    assert config.embedding_rows is not None
    return layers.replicated_embedding(config.embedding_rows, config.hidden_size, -1 if config.zero_last_row else None)


class Sinusoidal(nn.Module):
    """Sines and cosines of positions of any size, at wavelengths from 2 pi to 10000 x 2 pi.

    They are scaled by the initial standard deviation of the token embedding. This keeps the published proportion
    between the two: the authors add sines to token embeddings of standard deviation 1.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5; sines in the first half of the width.
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self._width, self._scale, self._own = config.hidden_size, config.init_std, layers.local_sequence_ids

    def forward(self, positions_Bt: Tensor) -> Tensor:
        """Map positions [B, t] to fp32 [B, t, D], computed in fp32."""
        return sinusoids(self._own(positions_Bt), self._width) * self._scale
