"""Where the tokens of a BiPE model stand, what a cache remembers of it, and what attention makes of it.

Places travel with the keys: those of layer 0 carry a few more channels, in which the cache remembers where
in its segment every token stands. Whatever generation does to a cache (reorder, crop, repeat) keeps them
right, and a cached continuation starts from them, for any split of the input into chunks.

B batch · T new tokens · C cached tokens, or all slots of a static cache · S keys that attention sees: C and T, or the
slots · N query heads · H head width
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .configuration_bipe import BipeConfig

_DIGIT = 256  # bf16, the coarsest dtype a cache may have, holds every integer up to here
_UNIT = 1024  # of ALiBi's channel for the query's own position, so that it is within fp16
_DIGITS = 3  # of each of the two counts that a key carries: up to 16.7 million


class Places(NamedTuple):
    """Where tokens stand: int64, intra ids not clipped. Padding repeats the state before it."""

    intra: Tensor  # tokens of this segment before the token (of the sequence, for encodings without segments)
    inter: Tensor  # segments closed before the token
    next_intra: Tensor  # the same of the token that follows
    next_inter: Tensor


class Memory(NamedTuple):
    """What a cache knows of its tokens: int64 [B, C], as in `Places`; slots that are not filled yet hold zeros."""

    next_intra: Tensor
    next_inter: Tensor
    num_filled: Tensor | None = None  # of the slots of a static cache, int64 []; None: all are

    @property
    def num_held(self) -> int:
        """Tokens in the cache; of a static one this waits for the device."""
        return self.next_intra.shape[1] if self.num_filled is None else int(self.num_filled)

    def last(self) -> tuple[Tensor, Tensor]:
        """Both counts [B, 1] after the last token."""
        if self.num_filled is None:
            return self.next_intra[:, -1:], self.next_inter[:, -1:]
        slot = (self.num_filled - 1).clamp(min=0).view(1)  # an emptied cache holds zeros
        return self.next_intra.index_select(1, slot), self.next_inter.index_select(1, slot)

    def own_places(self, in_segments: bool) -> Tensor:
        """Inter ids of the tokens, or their places in the sequence for encodings without segments: [B, C]."""
        if in_segments:
            closed = (self.next_intra == 0) & (self.next_inter > 0)
            return self.next_inter - closed.long()
        return (self.next_intra - 1).clamp(min=0)


class Encoding(NamedTuple):
    """What all layers share in one forward pass."""

    rotation: tuple[Tensor, Tensor] | None = None  # RoPE: cosines and sines [B, 1, T, H/2] of the new tokens
    bias: tuple[Tensor, Tensor] | None = None  # ALiBi: channels of queries [B, N, T, 7] and of keys [B, 1, S, 7]
    growth: Tensor | None = None  # log_scale's factor on queries [B, 1, T, 1]
    memory: Tensor | None = None  # what the cached keys of layer 0 are to remember [B, 1, T, C]


def find_places(config: BipeConfig, input_ids: Tensor | None, real_BT: Tensor, memory: Memory | None = None) -> Places:
    """Places of new tokens [B, T], in segments for the bilevel encodings, else in the sequence.

    Args:
        config: of the model.
        input_ids: the new tokens; may be None where segments do not depend on them.
        real_BT: False at padding, which has no place and closes nothing.
        memory: of the tokens before; the first real token of a row opens its first segment.
    """
    nothing = real_BT.new_zeros(1, 1, dtype=torch.int64)
    start = memory.last() if memory else (nothing, nothing)
    seen_BT = start[0] + real_BT.cumsum(-1)  # real tokens since the segment that was open at the start began
    ends_BT = _segment_ends(config, input_ids, seen_BT) & real_BT
    closed_BT = start[1] + ends_BT.cumsum(-1)
    opened_BT = torch.where(ends_BT, seen_BT, 0).cummax(-1).values  # where the segment of the next token begins
    intra_BT = seen_BT - real_BT.long() - F.pad(opened_BT, (1, -1))
    return Places(intra_BT, closed_BT - ends_BT.long(), seen_BT - opened_BT, closed_BT)


def _segment_ends(config: BipeConfig, input_ids: Tensor | None, seen_BT: Tensor) -> Tensor:
    """True where a token closes a segment."""
    if not config.bilevel:
        return torch.zeros_like(seen_BT, dtype=torch.bool)
    if config.segment_length is not None:
        return seen_BT % config.segment_length == 0
    if input_ids is None or config.segments is None:
        raise ValueError("inputs_embeds alone do not tell where segments end: give input_ids")
    return torch.isin(input_ids, torch.tensor(config.segments["token_ids"], device=input_ids.device))


def memorise(places: Places) -> Tensor:
    """The channels [B, 1, T, C] that the cached keys of layer 0 carry: both next counts, digit by digit."""
    counts_BT2 = torch.stack((places.next_intra, places.next_inter), dim=-1)
    digits = [counts_BT2 // _DIGIT**power % _DIGIT for power in range(_DIGITS)]
    return torch.cat(digits, dim=-1)[:, None].float()


def recall(cache: Cache | None, head_dim: int, device: torch.device) -> Memory | None:
    """What the cache remembers; None when it has not seen a token.

    Raises:
        ValueError: the cache was filled by something else, or is of a kind that may not keep the channels exact.
    """
    if cache is None:
        return None
    if any(type(layer) not in (DynamicLayer, StaticLayer) for layer in getattr(cache, "layers", [None])):
        raise ValueError(
            "of this cache it is not known that it keeps segment positions exact: use a DynamicCache or a StaticCache, "
            "in generate() cache_implementation='dynamic' or 'static'"
        )
    layer: Any = cache.layers[0] if cache.layers else None
    if layer is None or not layer.is_initialized:
        return None
    keys = layer.keys
    if keys is None or keys.shape[-1] != head_dim + 2 * _DIGITS:
        raise ValueError(
            "past_key_values do not hold the segment positions of their tokens: pass a cache that this model filled "
            "from the first token on, or all tokens without a cache"
        )
    if keys.shape[2] == 0:
        return None
    digits = keys[:, 0, :, head_dim:].to(device).round().long().unflatten(-1, (_DIGITS, 2))
    powers = _DIGIT ** torch.arange(_DIGITS, device=device)
    next_intra, next_inter = (digits * powers[:, None]).sum(-2).unbind(-1)
    num_filled = layer.cumulative_length.to(device) if isinstance(layer, StaticLayer) else None
    return Memory(next_intra, next_inter, num_filled)


def encode(config: BipeConfig, places: Places, memory: Memory | None, attention_mask: Tensor | None) -> Encoding:
    """What attention needs of the places, once for all layers."""
    new_BT = places.inter if config.bilevel else places.intra
    growth = None
    if config.log_scale:
        growth = ((new_BT + 1).float().log() / math.log(config.train_len_tokens))[:, None, :, None]
    if config.encoding.endswith("alibi"):
        return Encoding(bias=_alibi(config, new_BT, memory), growth=growth)
    return Encoding(rotation=_rotary(config, new_BT, memory, attention_mask), growth=growth)


def alibi_slopes(num_heads: int) -> list[float]:
    """One slope a head (Press et al. 2022); counts that are no power of two borrow from the next higher one."""
    lower = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / lower) for i in range(lower)]
    return slopes + [2.0 ** (-4.0 * (i + 1) / lower) for i in range(0, 2 * lower, 2)][: num_heads - lower]


def _alibi(config: BipeConfig, new_BT: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor]:
    """The bias slope x (key - last key) as channels of queries and keys, which come before those of the head.

    Softmax ignores what is constant along the keys, so the query's own position drops out. Slopes stand
    in three parts, distances in two, each of which bf16 holds exactly. The second channel adds what makes scores near
    the query small; kernels add in order, so that large numbers cancel before anything small is added.
    """
    position_BS = new_BT
    if memory is not None:
        old_BC = memory.own_places(config.bilevel)
        if memory.num_filled is None:
            position_BS = torch.cat((old_BC, new_BT), dim=1)
        else:
            slots = memory.num_filled + torch.arange(new_BT.shape[1], device=new_BT.device)
            position_BS = old_BC.index_copy(1, slots, new_BT)
    if position_BS.shape[1] > _DIGIT**2:
        raise ValueError(f"ALiBi's key bias is exact up to {_DIGIT**2} tokens; these are {position_BS.shape[1]}")
    factor = 96.0 if config.bilevel else 1.0
    slopes = torch.tensor(alibi_slopes(config.num_attention_heads), device=position_BS.device) * factor
    slopes_N1 = slopes[:, None] * math.sqrt(config.head_dim)
    back_BT, back_BS = new_BT[:, -1:] - new_BT, new_BT[:, -1:] - position_BS
    own_BNT, rest_N1, parts = slopes_N1 / _UNIT * back_BT[:, None], slopes_N1, []
    for _ in range(3):
        parts.append(rest_N1.bfloat16().float())
        rest_N1 = rest_N1 - parts[-1]
    high, middle, low = (part_N1.expand_as(own_BNT) for part_N1 in parts)
    fine_BS = back_BS % _DIGIT
    coarse_BS, unit_BS = back_BS - fine_BS, torch.full_like(back_BS, -_UNIT)
    keys_BS7 = -torch.stack([coarse_BS, unit_BS, fine_BS, coarse_BS, fine_BS, coarse_BS, fine_BS], dim=-1).float()
    return torch.stack([high, own_BNT, high, middle, middle, low, low], dim=-1), keys_BS7[:, None]


def _rotary(
    config: BipeConfig, position_BT: Tensor, memory: Memory | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, angles in fp32; dynamic scaling looks at the number of real tokens of the row."""
    scaling, width, device = config.rope_parameters or {}, config.head_dim, position_BT.device
    rope_type, base = scaling.get("rope_type", "default"), torch.tensor(float(scaling.get("rope_theta", 10000.0)))
    angle_of = position_BT.float()
    if rope_type == "linear":
        angle_of = angle_of / scaling["factor"]
    if rope_type == "dynamic":
        num_cached = 0 if memory is None else memory.num_held
        trained, total = config.train_len_tokens, num_cached + position_BT.shape[1]
        count = torch.full((1, 1), total) if attention_mask is None else attention_mask.sum(-1, keepdim=True)
        if num_cached and int(count.max()) > trained:
            raise ValueError(
                f"{total} tokens with dynamic RoPE scaling, trained at {trained}: every further token changes the "
                "encoding of all earlier ones, so a cache cannot be continued. Use generate(..., use_cache=False)"
            )
        stretch = scaling["factor"] * count[..., None].clamp(min=trained).double() / trained - (scaling["factor"] - 1)
        base = (base * stretch ** (width / (width - 2))).float()
    exponents_H = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    angles_B1TH = (angle_of[..., None] * (1.0 / base.to(device) ** exponents_H)).unsqueeze(1)
    return angles_B1TH.cos(), angles_B1TH.sin()
