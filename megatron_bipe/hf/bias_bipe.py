"""ALiBi and T5's relative bias of BiPE models.

B batch · T new tokens · S keys that attention sees · N query heads
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_bipe import BipeConfig
from .functional_bipe import (
    BILEVEL_ALIBI_FACTOR,
    MAX_ALIBI_POSITIONS,
    alibi_key_channels,
    alibi_query_channels,
    alibi_slopes,
    interleave_zeros,
    t5_buckets,
)
from .positions_bipe import CachedPositions, key_positions


def alibi(
    config: BipeConfig, new_BT: Tensor, cached: CachedPositions | None, _attention_mask: Tensor | None
) -> dict[str, Any]:
    """Return the bias slope x (key - last key) as channels that are prepended to queries and keys.

    Softmax ignores terms that are constant along the keys, so the query's own position cancels. Slopes are split into
    three parts and distances into two, each exact in bf16. The second channel adds a term that keeps scores near
    the query small; kernels add in order, so that large numbers cancel before anything small is added. A zero follows
    each channel because AMX accumulates even and odd channels separately.
    """
    position_BS = key_positions(config, new_BT, cached)
    if position_BS.shape[1] > MAX_ALIBI_POSITIONS:
        raise ValueError(f"ALiBi is exact up to {MAX_ALIBI_POSITIONS} tokens; the input has {position_BS.shape[1]}")
    factor = BILEVEL_ALIBI_FACTOR if config.bilevel else 1.0
    slopes = torch.tensor(alibi_slopes(config.num_attention_heads), device=position_BS.device) * factor
    last_B1 = new_BT[:, -1:]
    queries_BNT7 = alibi_query_channels(slopes[:, None] * math.sqrt(config.head_dim), (last_B1 - new_BT)[:, None])
    keys_BS7 = alibi_key_channels(last_B1 - position_BS).float()
    return {"channels": (interleave_zeros(queries_BNT7), interleave_zeros(keys_BS7[:, None]))}


def t5(
    config: BipeConfig, new_BT: Tensor, cached: CachedPositions | None, _attention_mask: Tensor | None
) -> dict[str, Any]:
    """Return T5 buckets of query-to-key distances (Raffel et al. 2020): exact ones, then logarithmic ones."""
    distance_BTS = new_BT[:, :, None] - key_positions(config, new_BT, cached)[:, None, :]
    return {"buckets": t5_buckets(distance_BTS)}


def biased_mask(bias_BTSN: Tensor, mask: Tensor) -> Tensor:
    """Return the score bias where the mask [B, 1, T, S] admits a key, and near minus infinity elsewhere."""
    bias_BNTS = bias_BTSN.permute(0, 3, 1, 2)
    bias_BNTS = F.pad(bias_BNTS, (0, mask.shape[-1] - bias_BNTS.shape[-1]))  # a fresh static cache has empty slots
    if mask.dtype == torch.bool:
        return bias_BNTS.masked_fill(~mask, torch.finfo(bias_BNTS.dtype).min)
    return bias_BNTS + mask
