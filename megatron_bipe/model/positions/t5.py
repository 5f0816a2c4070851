"""T5's relative bias.

B batch · T positions · S keys · n query heads of this rank
"""

import torch
from torch import Tensor, nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory, local_heads
from megatron_bipe.model.positions.base import RelativeEncoding
from megatron_bipe.model.positions.functional import NUM_T5_BUCKETS, t5_buckets


class T5Bias(nn.Module, RelativeEncoding):
    """A learned number for each head and bucket of distances, added to the scores.

    Each block has a table of its own (T5 shares one, which stages of a pipeline cannot). Scores cannot stay fused: they
    are materialised, O(T^2) a head, which is what this baseline costs.

    Source: Raffel et al. 2020 (arXiv 1910.10683), the buckets of its decoder.
    """

    biases_scores = True

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.table = layers.per_head_embedding(NUM_T5_BUCKETS, config.num_heads)
        self._rows_alike = not config.bilevel
        first_of_table = layers.rank * config.num_heads // layers.ranks
        here = local_heads(config.num_heads, layers)
        self._own_heads = slice(here.start - first_of_table, here.stop - first_of_table)

    def prepare(self, positions_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """Buckets of all pairs, int64 [B, T, T]; one row for all where all windows have the same positions."""
        del dtype
        rows_BT = positions_BT[:1] if self._rows_alike else positions_BT
        return t5_buckets(rows_BT[:, :, None] - rows_BT[:, None, :])

    def score_bias(self, prepared: Tensor) -> Tensor:
        """Of this rank's heads; minus infinity at later keys."""
        num_tokens = prepared.shape[-1]
        bias_BnTT = self.table(prepared)[..., self._own_heads].permute(0, 3, 1, 2)
        later_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=prepared.device).triu(1)
        return bias_BnTT.masked_fill(later_TT, -torch.inf)
