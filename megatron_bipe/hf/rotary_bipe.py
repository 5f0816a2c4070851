"""RoPE and XPOS of BiPE models, with the frequency scaling types of transformers.

B batch · T new tokens · H head width
"""

from typing import Any

from torch import Tensor

from .configuration_bipe import BipeConfig
from .functional_bipe import (
    MAX_XPOS_TOKENS,
    rotary_frequencies,
    rotary_tables,
    stretched_base,
    xpos_factors,
    yarn_attention_factor,
    yarn_frequencies,
)
from .positions_bipe import CachedPositions, count_tokens, num_keys

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
        counts_B1 = count_tokens(config, position_BT.shape[1], cached, attention_mask, "dynamic RoPE scaling")
        excess_B11 = counts_B1[..., None].clamp(min=config.train_len_tokens).double() / config.train_len_tokens
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
