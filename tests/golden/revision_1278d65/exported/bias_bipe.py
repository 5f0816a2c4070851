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

_UNIT = 1024  # of ALiBi's channel for the query's own position, so that it is within fp16
_MAX_DISTANCE = 128  # of T5: from here on, all distances share the last bucket


def alibi_slopes(num_heads: int) -> list[float]:
    """One slope a head (Press et al. 2022); counts that are no power of two borrow from the next higher one."""
    lower = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / lower) for i in range(lower)]
    return slopes + [2.0 ** (-4.0 * (i + 1) / lower) for i in range(0, 2 * lower, 2)][: num_heads - lower]


def alibi(config: BipeConfig, new_BT: Tensor, memory: Memory | None, _attention_mask: Tensor | None) -> dict[str, Any]:
    """The bias slope x (key - last key) as channels of queries and keys, which come before those of the head.

    Softmax ignores what is constant along the keys, so the query's own position drops out. Slopes stand
    in three parts, distances in two, each of which bf16 holds exactly. The second channel adds what makes scores near
    the query small; kernels add in order, so that large numbers cancel before anything small is added. A zero follows
    each channel: AMX adds even and odd channels up apart.
    """
    position_BS = key_positions(config, new_BT, memory)
    if position_BS.shape[1] > DIGIT**2:
        raise ValueError(f"ALiBi's key bias is exact up to {DIGIT**2} tokens; these are {position_BS.shape[1]}")
    factor = 96.0 if config.bilevel else 1.0
    slopes = torch.tensor(alibi_slopes(config.num_attention_heads), device=position_BS.device) * factor
    slopes_N1 = slopes[:, None] * math.sqrt(config.head_dim)
    back_BT, back_BS = new_BT[:, -1:] - new_BT, new_BT[:, -1:] - position_BS
    own_BNT, rest_N1, parts = slopes_N1 / _UNIT * back_BT[:, None], slopes_N1, []
    for _ in range(3):
        parts.append(rest_N1.bfloat16().float())
        rest_N1 = rest_N1 - parts[-1]
    high, middle, low = (part_N1.expand_as(own_BNT) for part_N1 in parts)
    fine_BS = back_BS % DIGIT
    coarse_BS, unit_BS = back_BS - fine_BS, torch.full_like(back_BS, -_UNIT)
    keys_BS7 = -torch.stack([coarse_BS, unit_BS, fine_BS, coarse_BS, fine_BS, coarse_BS, fine_BS], dim=-1).float()
    queries_BNT7 = torch.stack([high, own_BNT, high, middle, middle, low, low], dim=-1)
    return {"channels": (_spread(queries_BNT7), _spread(keys_BS7[:, None]))}


def _spread(channels: Tensor) -> Tensor:
    return torch.stack([channels, torch.zeros_like(channels)], dim=-1).flatten(-2)


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
