"""ALiBi and T5's relative bias of BiPE models: what is added to scores.

B batch · T new tokens · S keys that attention sees · N query heads
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_bipe import NUM_BUCKETS, BipeConfig
from .positions_bipe import DIGIT, Memory, key_positions

_MAX_DISTANCE = 128  # of T5: from here on, all distances share the last bucket


def alibi_slopes(num_heads: int) -> list[float]:
    """One slope a head (Press et al. 2022); counts that are no power of two borrow from the next higher one."""
    lower = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / lower) for i in range(lower)]
    return slopes + [2.0 ** (-4.0 * (i + 1) / lower) for i in range(0, 2 * lower, 2)][: num_heads - lower]


def alibi(config: BipeConfig, new_BT: Tensor, memory: Memory | None, _attention_mask: Tensor | None) -> dict[str, Any]:
    """The bias slope x (key - last key) as channels of queries and keys.

    Softmax ignores what is constant along the keys, so the query's own position drops out. Slopes stand
    in three parts, distances in two, each of which bf16 holds exactly.
    """
    position_BS = key_positions(config, new_BT, memory)
    if position_BS.shape[1] > DIGIT**2:
        raise ValueError(f"ALiBi's key bias is exact up to {DIGIT**2} tokens; these are {position_BS.shape[1]}")
    factor = 96.0 if config.bilevel else 1.0
    slopes = torch.tensor(alibi_slopes(config.num_attention_heads), device=position_BS.device) * factor
    rest, parts = slopes * math.sqrt(config.head_dim), []
    for _ in range(3):
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
    back_BS = new_BT[:, -1:] - position_BS
    fine_BS = back_BS % DIGIT
    keys_BS6 = -torch.stack([back_BS - fine_BS] * 3 + [fine_BS] * 3, dim=-1).float()
    return {"channels": (torch.stack(parts * 2, dim=-1)[None, :, None], keys_BS6[:, None])}


def t5(config: BipeConfig, new_BT: Tensor, memory: Memory | None, _attention_mask: Tensor | None) -> dict[str, Any]:
    """Buckets of the distances from queries back to keys (Raffel et al. 2020): exact ones, then logarithmic ones."""
    distance_BTS = (new_BT[:, :, None] - key_positions(config, new_BT, memory)[:, None, :]).clamp(min=0)
    exact = NUM_BUCKETS // 2
    ratio_BTS = (distance_BTS.clamp(min=exact) / exact).log() / math.log(_MAX_DISTANCE / exact)
    far_BTS = (exact + (ratio_BTS * (NUM_BUCKETS - exact)).long()).clamp(max=NUM_BUCKETS - 1)
    return {"buckets": torch.where(distance_BTS < exact, distance_BTS, far_BTS)}


def biased_mask(bias_BTSN: Tensor, mask: Tensor) -> Tensor:
    """The bias of the scores where the mask [B, 1, T, S] lets them through, and next to minus infinity elsewhere."""
    bias_BNTS = bias_BTSN.permute(0, 3, 1, 2)
    bias_BNTS = F.pad(bias_BNTS, (0, mask.shape[-1] - bias_BNTS.shape[-1]))  # a fresh static cache has empty slots
    if mask.dtype == torch.bool:
        return bias_BNTS.masked_fill(~mask, torch.finfo(bias_BNTS.dtype).min)
    return bias_BNTS + mask
