"""T5's relative position bias.

B batch · T positions · S keys · n query heads of this rank
"""

import torch
from torch import Tensor, nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory, local_heads
from megatron_bipe.model.positions.base import RelativeEncoding
from megatron_bipe.model.positions.functional import NUM_T5_BUCKETS, t5_buckets


class T5Bias(nn.Module, RelativeEncoding):
    """A learned bias per head and distance bucket, added to the scores.

    Each block has its own embedding (T5 shares one, which pipeline stages cannot). The O(T^2) scores of each head are
    materialized, since a bias rules out fused attention.

    Source: Raffel et al. 2020 (arXiv 1910.10683), the buckets of its decoder.
    """

    biases_scores = True

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.table = layers.per_head_embedding(NUM_T5_BUCKETS, config.num_heads)
        self._same_positions = not config.bilevel
        first_head = layers.rank * config.num_heads // layers.ranks
        here = local_heads(config.num_heads, layers)
        self._own_heads = slice(here.start - first_head, here.stop - first_head)

    def prepare(self, positions_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the buckets of all pairs, int64 [B, T, T], or [1, T, T] if all sequences have the same positions."""
        del dtype
        rows_BT = positions_BT[:1] if self._same_positions else positions_BT
        return t5_buckets(rows_BT[:, :, None] - rows_BT[:, None, :])

    def score_bias(self, prepared: Tensor) -> Tensor:
        """Return the bias of this rank's heads, -inf at later keys."""
        num_tokens = prepared.shape[-1]
        bias_BnTT = self.table(prepared)[..., self._own_heads].permute(0, 3, 1, 2)
        later_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=prepared.device).triu(1)
        return bias_BnTT.masked_fill(later_TT, -torch.inf)
