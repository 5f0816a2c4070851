"""Encodings of a BiPE model, computed once per forward pass for all layers.

B batch · T new tokens · D width · H head width · S keys that attention sees · C channels
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .bias_bipe import alibi, t5
from .configuration_bipe import BipeConfig
from .functional_bipe import log_scale_factors
from .positions_bipe import CachedPositions, PositionIds, count_tokens
from .rotary_bipe import Tables, rope, xpos


class Encoding(NamedTuple):
    """Tensors that all layers use in one forward pass."""

    rotation: tuple[Tables, Tables] | None = None  # RoPE, XPOS: cosines and sines for new queries and new keys
    channels: tuple[Tensor, Tensor] | None = None  # ALiBi: for queries [B, N, T, 7] and keys [B, 1, S, 7]
    buckets: Tensor | None = None  # T5: rows of each layer's bias embedding [B, T, S]
    query_scale: Tensor | None = None  # log_scale: factor on queries [B, 1, T, 1]
    cached: Tensor | None = None  # positions to store with layer 0's cached keys [B, 1, T, C]


def _nope(*_: Any) -> dict[str, Any]:
    return {}


_RELATIVE: dict[str, Callable[..., dict[str, Any]]] = {
    "rope": rope,
    "alibi": alibi,
    "xpos": xpos,
    "t5": t5,
    "nope": _nope,
}


def encode(
    config: BipeConfig, position_ids: PositionIds, cached: CachedPositions | None, attention_mask: Tensor | None
) -> Encoding:
    """Compute the tensors that attention needs in every layer."""
    new_BT = position_ids.inter if config.bilevel else position_ids.intra
    if config.positions == "drawn":
        new_BT = _stretch_positions(config, new_BT, cached, attention_mask)
    query_scale = None
    if config.log_scale:
        query_scale = log_scale_factors(new_BT, config.train_len_tokens)
    return Encoding(query_scale=query_scale, **_RELATIVE[config.relative](config, new_BT, cached, attention_mask))


def _stretch_positions(
    config: BipeConfig, position_BT: Tensor, cached: CachedPositions | None, attention_mask: Tensor | None
) -> Tensor:
    """Stretch positions to the average spacing of those drawn in training."""
    counts = count_tokens(config, position_BT.shape[1], cached, attention_mask, "position stretching").to(
        position_BT.device
    )
    if int(counts.max()) > config.drawn_range:
        raise ValueError(f"{int(counts.max())} tokens exceed the {config.drawn_range} positions of {config.encoding}")
    return position_BT * config.drawn_range // counts.clamp(min=config.train_len_tokens)
