"""Where the tokens of a BiPE model stand, and what a cache remembers of it.

Places travel with the keys: those of layer 0 carry a few more channels, in which the cache remembers where
in its segment every token stands. Whatever generation does to a cache (reorder, crop, repeat) keeps them
right, and a cached continuation starts from them, for any split of the input into chunks.

B batch · T new tokens · C cached tokens, or all slots of a static cache · S keys that attention sees: C and T, or the
slots
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .configuration_bipe import BipeConfig

DIGIT = 256  # bf16, the coarsest dtype a cache may have, holds every integer up to here
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
    digits = [counts_BT2 // DIGIT**power % DIGIT for power in range(_DIGITS)]
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
    powers = DIGIT ** torch.arange(_DIGITS, device=device)
    next_intra, next_inter = (digits * powers[:, None]).sum(-2).unbind(-1)
    num_filled = layer.cumulative_length.to(device) if isinstance(layer, StaticLayer) else None
    return Memory(next_intra, next_inter, num_filled)


def real_tokens(
    attention_mask: Tensor | None, hidden_BTD: Tensor, memory: Memory | None, cache: Cache | None
) -> Tensor:
    """Bool [B, T]: False at padding among the new tokens."""
    rows, new = hidden_BTD.shape[:2]
    if attention_mask is None:
        return torch.ones(rows, new, dtype=torch.bool, device=hidden_BTD.device)
    shape = tuple(attention_mask.shape)
    slots = cache.get_max_length() if cache is not None and cache.is_compileable else -1
    if memory is not None and memory.num_filled is not None and shape == (rows, slots):
        places = memory.num_filled + torch.arange(new, device=hidden_BTD.device)
        return attention_mask.index_select(1, places).bool()
    num_cached = 0 if memory is None else memory.num_held
    if shape == (rows, slots) or shape == (rows, num_cached + new):
        return attention_mask[:, num_cached : num_cached + new].bool()
    raise ValueError(
        f"attention_mask is {list(shape)}; positions need [{rows}, {num_cached + new}]: {num_cached} cached and {new} "
        "new tokens, 0 at padding"
    )


def key_positions(config: BipeConfig, new_BT: Tensor, memory: Memory | None) -> Tensor:
    """What the relative encoding goes by, of cached keys and of new ones, int64 [B, S]."""
    if memory is None:
        return new_BT
    old_BC = memory.own_places(config.bilevel)
    if memory.num_filled is None:
        return torch.cat((old_BC, new_BT), dim=1)
    slots = memory.num_filled + torch.arange(new_BT.shape[1], device=new_BT.device)
    return old_BC.index_copy(1, slots, new_BT)


def num_keys(num_new: int, memory: Memory | None) -> int:
    """Keys that attention sees: cached and new ones, or the slots of a static cache."""
    if memory is None:
        return num_new
    num_cached = memory.next_intra.shape[1]
    return num_cached + num_new if memory.num_filled is None else num_cached


def count_tokens(
    config: BipeConfig, num_new: int, memory: Memory | None, attention_mask: Tensor | None, what: str
) -> Tensor:
    """Real tokens of each row, int64 [B, 1] or [1, 1], for encodings that every further token changes.

    Raises:
        ValueError: a cache would have to be continued beyond the training length, up to which nothing changes.
    """
    num_cached = 0 if memory is None else memory.num_held
    trained, total = config.train_len_tokens, num_cached + num_new
    counts = torch.full((1, 1), total) if attention_mask is None else attention_mask.sum(-1, keepdim=True)
    if num_cached and int(counts.max()) > trained:
        raise ValueError(
            f"{total} tokens with {what}, trained at {trained}: every further token changes the "
            "encoding of all earlier ones, so a cache cannot be continued. Use generate(..., use_cache=False)"
        )
    return counts
