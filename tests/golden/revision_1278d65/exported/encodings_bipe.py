"""What a BiPE model makes of places: once for all layers what attention needs, and what is added to the embeddings.

B batch · T new tokens · D width · H head width · S keys that attention sees · C channels
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bias_bipe import alibi, t5
from .configuration_bipe import BipeConfig
from .positions_bipe import Memory, Places, count_tokens
from .rotary_bipe import Tables, rope, xpos


class Encoding(NamedTuple):
    """What all layers share in one forward pass."""

    rotation: tuple[Tables, Tables] | None = None  # RoPE, XPOS: cosines and sines of new queries, and of new keys
    channels: tuple[Tensor, Tensor] | None = None  # ALiBi: of queries [B, N, T, 7] and of keys [B, 1, S, 7]
    buckets: Tensor | None = None  # T5: rows of each layer's table [B, T, S]
    growth: Tensor | None = None  # log_scale's factor on queries [B, 1, T, 1]
    memory: Tensor | None = None  # what the cached keys of layer 0 are to remember [B, 1, T, C]


def _nope(*_: Any) -> dict[str, Any]:
    return {}


_RELATIVE: dict[str, Callable[..., dict[str, Any]]] = {
    "rope": rope,
    "alibi": alibi,
    "xpos": xpos,
    "t5": t5,
    "nope": _nope,
}


def encode(config: BipeConfig, places: Places, memory: Memory | None, attention_mask: Tensor | None) -> Encoding:
    """What attention needs of the places, once for all layers."""
    new_BT = places.inter if config.bilevel else places.intra
    if config.positions == "drawn":
        new_BT = _spread(config, new_BT, memory, attention_mask)
    growth = None
    if config.log_scale:
        growth = ((new_BT + 1).float().log() / math.log(config.train_len_tokens))[:, None, :, None]
    return Encoding(growth=growth, **_RELATIVE[config.relative](config, new_BT, memory, attention_mask))


def _spread(config: BipeConfig, place_BT: Tensor, memory: Memory | None, attention_mask: Tensor | None) -> Tensor:
    """Places as far apart as those drawn in training are on average."""
    counts = count_tokens(config, place_BT.shape[1], memory, attention_mask, "spread positions").to(place_BT.device)
    if int(counts.max()) > config.drawn_range:
        raise ValueError(f"{int(counts.max())} tokens exceed the {config.drawn_range} positions of {config.encoding}")
    return place_BT * config.drawn_range // counts.clamp(min=config.train_len_tokens)


def sinusoidal(config: BipeConfig, place_BT: Tensor) -> Tensor:
    """Sines and cosines of places [B, T, D] (Vaswani et al. 2017), as large beside new token rows as theirs are."""
    pairs = torch.arange(config.hidden_size // 2, device=place_BT.device)
    angles = place_BT.float()[..., None] * (pairs.float() * (-2 * math.log(10_000.0) / config.hidden_size)).exp()
    return torch.cat((angles.sin(), angles.cos()), dim=-1) * config.initializer_range
