"""Position ids of a BiPE model's tokens, and their storage in a key/value cache.

Position ids are stored with the keys: those of layer 0 have additional channels that hold the ids of each cached token.
They stay correct under every cache operation of generation (reorder, crop, repeat), and a cached continuation starts
from them, for any split of the input into chunks.

B batch · T new tokens · C cached tokens, or all slots of a static cache · S keys that attention sees: C + T, or the
slots
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .configuration_bipe import BipeConfig

DIGIT = 256  # bf16, the coarsest cache dtype, represents all integers up to here
_DIGITS = 3  # per count, two counts per key: up to 16.7 million


class PositionIds(NamedTuple):
    """Position ids, int64 [B, T], intra ids not clipped; at padding the state before it is repeated."""

    intra: Tensor  # earlier tokens of its segment (of the sequence, for encodings without segments)
    inter: Tensor  # segments that ended before the token
    next_intra: Tensor  # the same for the following token
    next_inter: Tensor


class CachedPositions(NamedTuple):
    """Position ids stored in a cache, int64 [B, C] as in `PositionIds`; unfilled slots hold zeros."""

    next_intra: Tensor
    next_inter: Tensor
    num_filled: Tensor | None = None  # filled slots of a static cache, int64 []; None: all

    @property
    def num_cached(self) -> int:
        """Number of cached tokens; for a static cache this synchronizes with the device."""
        return self.next_intra.shape[1] if self.num_filled is None else int(self.num_filled)

    def last(self) -> tuple[Tensor, Tensor]:
        """Return both counts [B, 1] after the last token."""
        if self.num_filled is None:
            return self.next_intra[:, -1:], self.next_inter[:, -1:]
        slot = (self.num_filled - 1).clamp(min=0).view(1)  # a cleared cache holds zeros
        return self.next_intra.index_select(1, slot), self.next_inter.index_select(1, slot)

    def own_positions(self, in_segments: bool) -> Tensor:
        """Return the tokens' inter ids, or sequence positions for encodings without segments: [B, C]."""
        if in_segments:
            closed = (self.next_intra == 0) & (self.next_inter > 0)
            return self.next_inter - closed.long()
        return (self.next_intra - 1).clamp(min=0)


def find_position_ids(
    config: BipeConfig, input_ids: Tensor | None, real_BT: Tensor, cached: CachedPositions | None = None
) -> PositionIds:
    """Return the position ids of new tokens [B, T]: within segments for bilevel encodings, else in the sequence.

    Args:
        config: configuration of the model.
        input_ids: the new tokens; may be None if segments do not depend on them.
        real_BT: False at padding, which has no position and does not end a segment.
        cached: positions of earlier tokens; without it, the first real token of a row starts its first segment.
    """
    nothing = real_BT.new_zeros(1, 1, dtype=torch.int64)
    start = cached.last() if cached else (nothing, nothing)
    seen_BT = start[0] + real_BT.cumsum(-1)  # real tokens since the initially open segment began
    ends_BT = _find_segment_ends(config, input_ids, seen_BT) & real_BT
    closed_BT = start[1] + ends_BT.cumsum(-1)
    opened_BT = torch.where(ends_BT, seen_BT, 0).cummax(-1).values  # start of the next token's segment
    intra_BT = seen_BT - real_BT.long() - F.pad(opened_BT, (1, -1))
    return PositionIds(intra_BT, closed_BT - ends_BT.long(), seen_BT - opened_BT, closed_BT)


def _find_segment_ends(config: BipeConfig, input_ids: Tensor | None, seen_BT: Tensor) -> Tensor:
    """Return True where a token ends a segment."""
    if not config.bilevel:
        return torch.zeros_like(seen_BT, dtype=torch.bool)
    if config.segment_length is not None:
        return seen_BT % config.segment_length == 0
    if input_ids is None or config.segments is None:
        raise ValueError("inputs_embeds do not determine segment ends: pass input_ids")
    return torch.isin(input_ids, torch.tensor(config.segments["token_ids"], device=input_ids.device))


def write_cache_positions(position_ids: PositionIds) -> Tensor:
    """Return the channels [B, 1, T, C] for layer 0's cached keys: the digits of both next counts."""
    counts_BT2 = torch.stack((position_ids.next_intra, position_ids.next_inter), dim=-1)
    digits = [counts_BT2 // DIGIT**power % DIGIT for power in range(_DIGITS)]
    return torch.cat(digits, dim=-1)[:, None].float()


def read_cache_positions(cache: Cache | None, head_dim: int, device: torch.device) -> CachedPositions | None:
    """Return the position ids stored in the cache; None if it is empty.

    Raises:
        ValueError: this model did not fill the cache, or the cache type may not preserve the channels exactly.
    """
    if cache is None:
        return None
    if any(type(layer) not in (DynamicLayer, StaticLayer) for layer in getattr(cache, "layers", [None])):
        raise ValueError(
            "this cache type may not preserve segment positions exactly: use a DynamicCache or a StaticCache, "
            "in generate() cache_implementation='dynamic' or 'static'"
        )
    layer: Any = cache.layers[0] if cache.layers else None
    if layer is None or not layer.is_initialized:
        return None
    keys = layer.keys
    if keys is None or keys.shape[-1] != head_dim + 2 * _DIGITS:
        raise ValueError(
            "past_key_values do not hold the segment positions of their tokens: pass a cache that this model filled "
            "from the first token, or all tokens without a cache"
        )
    if keys.shape[2] == 0:
        return None
    digits = keys[:, 0, :, head_dim:].to(device).round().long().unflatten(-1, (_DIGITS, 2))
    powers = DIGIT ** torch.arange(_DIGITS, device=device)
    next_intra, next_inter = (digits * powers[:, None]).sum(-2).unbind(-1)
    num_filled = layer.cumulative_length.to(device) if isinstance(layer, StaticLayer) else None
    return CachedPositions(next_intra, next_inter, num_filled)


def real_tokens(
    attention_mask: Tensor | None, hidden_BTD: Tensor, cached: CachedPositions | None, cache: Cache | None
) -> Tensor:
    """Return bool [B, T], False where a new token is padding."""
    rows, new = hidden_BTD.shape[:2]
    if attention_mask is None:
        return torch.ones(rows, new, dtype=torch.bool, device=hidden_BTD.device)
    shape = tuple(attention_mask.shape)
    slots = cache.get_max_length() if cache is not None and cache.is_compileable else -1
    if cached is not None and cached.num_filled is not None and shape == (rows, slots):
        position_ids = cached.num_filled + torch.arange(new, device=hidden_BTD.device)
        return attention_mask.index_select(1, position_ids).bool()
    num_cached = 0 if cached is None else cached.num_cached
    if shape == (rows, slots) or shape == (rows, num_cached + new):
        return attention_mask[:, num_cached : num_cached + new].bool()
    raise ValueError(
        f"attention_mask is {list(shape)} but must be [{rows}, {num_cached + new}]: {num_cached} cached and {new} "
        "new tokens, 0 at padding"
    )


def key_positions(config: BipeConfig, new_BT: Tensor, cached: CachedPositions | None) -> Tensor:
    """Return the positions of cached and new keys for the relative encoding, int64 [B, S]."""
    if cached is None:
        return new_BT
    old_BC = cached.own_positions(config.bilevel)
    if cached.num_filled is None:
        return torch.cat((old_BC, new_BT), dim=1)
    slots = cached.num_filled + torch.arange(new_BT.shape[1], device=new_BT.device)
    return old_BC.index_copy(1, slots, new_BT)


def num_keys(num_new: int, cached: CachedPositions | None) -> int:
    """Return the number of keys that attention sees: cached and new ones, or the slots of a static cache."""
    if cached is None:
        return num_new
    num_cached = cached.next_intra.shape[1]
    return num_cached + num_new if cached.num_filled is None else num_cached


def count_tokens(
    limit_tokens: int, num_new: int, cached: CachedPositions | None, attention_mask: Tensor | None, what: str
) -> Tensor:
    """Count the real tokens of each row, int64 [B, 1] or [1, 1], for encodings that depend on the length.

    Raises:
        ValueError: a cache would be continued beyond the limit, up to which earlier keys do not change.
    """
    num_cached = 0 if cached is None else cached.num_cached
    total = num_cached + num_new
    counts = torch.full((1, 1), total) if attention_mask is None else attention_mask.sum(-1, keepdim=True)
    if num_cached and int(counts.max()) > limit_tokens:
        raise ValueError(
            f"{total} tokens exceed the original length {limit_tokens}: {what} then changes the encoding of all "
            "earlier tokens with each new one, so a cache cannot be continued. Use generate(..., use_cache=False)"
        )
    return counts
