"""Encodings of a BiPE model, computed once per forward pass for all layers.

B batch · T new tokens · D width · N query heads · H head width · S keys that attention sees · C channels
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_bipe import BipeConfig
from .functional_bipe import (
    BILEVEL_ALIBI_FACTOR,
    MAX_ALIBI_POSITIONS,
    MAX_XPOS_TOKENS,
    alibi_key_channels,
    alibi_query_channels,
    alibi_slopes,
    log_scale_factors,
    rotary_frequencies,
    rotary_tables,
    spread_channels,
    stretched_base,
    t5_buckets,
    xpos_factors,
    yarn_attention_factor,
    yarn_frequencies,
)
from .positions_bipe import CachedPositions, PositionIds, count_tokens, key_positions, num_keys

Tables = tuple[Tensor, Tensor]  # cosines and sines [B, 1, T, H/2]


def rope(
    config: BipeConfig, position_BT: Tensor, cached: CachedPositions | None, attention_mask: Tensor | None
) -> dict[str, Any]:
    tables = _tables(config, position_BT, cached, attention_mask)
    return {"rotation": (tables, tables)}


def xpos(
    config: BipeConfig, position_BT: Tensor, cached: CachedPositions | None, attention_mask: Tensor | None
) -> dict[str, Any]:
    """Scale queries by zeta^(position/512) and keys by its inverse, relative to the middle of the training length."""
    num_tokens = num_keys(position_BT.shape[1], cached)
    if num_tokens > MAX_XPOS_TOKENS:
        raise ValueError(f"XPOS stays within range up to {MAX_XPOS_TOKENS} tokens; the input has {num_tokens}")
    cos_B1TH, sin_B1TH = _tables(config, position_BT, cached, attention_mask)
    scale_B1TH, inverse_B1TH = xpos_factors(position_BT, config.head_dim, config.train_len_tokens)
    queries = cos_B1TH * scale_B1TH, sin_B1TH * scale_B1TH
    return {"rotation": (queries, (cos_B1TH * inverse_B1TH, sin_B1TH * inverse_B1TH))}


def _tables(
    config: BipeConfig, position_BT: Tensor, cached: CachedPositions | None, attention_mask: Tensor | None
) -> Tables:
    """Return fp32 cosines and sines; dynamic scaling depends on the number of real tokens in each row."""
    scaling, width, device = config.rope_parameters or {}, config.head_dim, position_BT.device
    base, kind = float(scaling.get("rope_theta", 10000.0)), scaling.get("rope_type", "default")
    if kind == "dynamic":
        original = scaling.get("original_max_position_embeddings") or config.train_len_tokens
        counts_B1 = count_tokens(original, position_BT.shape[1], cached, attention_mask, "dynamic RoPE scaling")
        excess_B11 = counts_B1[..., None].clamp(min=original).double() / original
        factor = scaling["factor"]
        base_B11 = stretched_base(base, width, factor * excess_B11 - (factor - 1)).float().to(device)
        return rotary_tables(position_BT, rotary_frequencies(width, base_B11, device))
    frequencies_H = rotary_frequencies(width, base, device)
    if kind == "linear":
        return rotary_tables(position_BT, frequencies_H / scaling["factor"])
    if kind == "yarn":
        betas = scaling.get("beta_fast", 32.0), scaling.get("beta_slow", 1.0)
        original = scaling["original_max_position_embeddings"]
        frequencies_H = yarn_frequencies(frequencies_H, base, scaling["factor"], original, betas)
        factor = scaling.get("attention_factor") or yarn_attention_factor(scaling["factor"])
        return rotary_tables(position_BT, frequencies_H, factor)
    return rotary_tables(position_BT, frequencies_H)


def alibi(
    config: BipeConfig, new_BT: Tensor, cached: CachedPositions | None, _attention_mask: Tensor | None
) -> dict[str, Any]:
    """Return the bias slope x (key - last key) as channels that are prepended to queries and keys.

    Softmax ignores terms that are constant along the keys, so the query's own position cancels. Slopes are split into
    three parts and distances into two, each exact in bf16. The second channel adds a term that keeps scores near
    the query small; kernels add in order, so that large numbers cancel before anything small is added. Zeros between
    and after the channels serve AMX and tensor cores, which add in groups.
    """
    position_BS = key_positions(config, new_BT, cached)
    if position_BS.shape[1] > MAX_ALIBI_POSITIONS:
        raise ValueError(f"ALiBi is exact up to {MAX_ALIBI_POSITIONS} tokens; the input has {position_BS.shape[1]}")
    factor = BILEVEL_ALIBI_FACTOR if config.bilevel else 1.0
    slopes = torch.tensor(alibi_slopes(config.num_attention_heads), device=position_BS.device) * factor
    last_B1 = new_BT[:, -1:]
    queries_BNT7 = alibi_query_channels(slopes[:, None] * math.sqrt(config.head_dim), (last_B1 - new_BT)[:, None])
    keys_BS7 = alibi_key_channels(last_B1 - position_BS).float()
    return {"channels": (spread_channels(queries_BNT7), spread_channels(keys_BS7[:, None]))}


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
    masked = ~mask if mask.dtype == torch.bool else mask < 0
    return bias_BNTS.masked_fill(masked, torch.finfo(bias_BNTS.dtype).min)  # a sum could overflow to minus infinity


class Encoding(NamedTuple):
    """Tensors that all layers use in one forward pass."""

    rotation: tuple[Tables, Tables] | None = None  # RoPE, XPOS: cosines and sines for new queries and new keys
    channels: tuple[Tensor, Tensor] | None = None  # ALiBi: for queries [B, N, T, 16] and keys [B, 1, S, 16]
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
    trained, num_new = config.train_len_tokens, position_BT.shape[1]
    counts = count_tokens(trained, num_new, cached, attention_mask, "position stretching").to(position_BT.device)
    if int(counts.max()) > config.drawn_range:
        raise ValueError(f"{int(counts.max())} tokens exceed the {config.drawn_range} positions of {config.encoding}")
    return position_BT * config.drawn_range // counts.clamp(min=trained)
