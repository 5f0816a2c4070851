"""RoPE and XPOS of BiPE models, with the stretched frequencies that transformers knows.

B batch · T new tokens · H head width
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_bipe import BipeConfig
from .positions_bipe import Memory, count_tokens, num_keys

Tables = tuple[Tensor, Tensor]  # cosines and sines [B, 1, T, H/2]

_DECAY_POSITIONS, _GAMMA = 512, 0.4  # of XPOS (Sun et al. 2022), as published
_MAX_FADING_TOKENS = 2**14  # beyond, powers leave the range of bf16 and fp32


def rope(
    config: BipeConfig, position_BT: Tensor, memory: Memory | None, attention_mask: Tensor | None
) -> dict[str, Any]:
    """The same cosines and sines for queries and keys."""
    tables = _tables(config, position_BT, memory, attention_mask)
    return {"rotation": (tables, tables)}


def xpos(
    config: BipeConfig, position_BT: Tensor, memory: Memory | None, attention_mask: Tensor | None
) -> dict[str, Any]:
    """Queries times zeta^(position/512), keys times its inverse; counted from the middle of the training length."""
    num_tokens = num_keys(position_BT.shape[1], memory)
    if num_tokens > _MAX_FADING_TOKENS:
        raise ValueError(f"XPOS stays in range up to {_MAX_FADING_TOKENS} tokens; these are {num_tokens}")
    cos_B1TH, sin_B1TH = _tables(config, position_BT, memory, attention_mask)
    pairs_H = torch.arange(0, config.head_dim, 2, device=position_BT.device) / config.head_dim
    powers_BT = (position_BT - config.train_len_tokens // 2).float() / _DECAY_POSITIONS
    factor_B1TH = ((pairs_H + _GAMMA) / (1 + _GAMMA))[None, None, None] ** powers_BT[:, None, :, None]
    queries = cos_B1TH * factor_B1TH, sin_B1TH * factor_B1TH
    return {"rotation": (queries, (cos_B1TH / factor_B1TH, sin_B1TH / factor_B1TH))}


def _tables(config: BipeConfig, position_BT: Tensor, memory: Memory | None, attention_mask: Tensor | None) -> Tables:
    """In fp32; dynamic scaling looks at the number of real tokens of the row."""
    scaling, width, device = config.rope_parameters or {}, config.head_dim, position_BT.device
    rope_type, base = scaling.get("rope_type", "default"), torch.tensor(float(scaling.get("rope_theta", 10000.0)))
    factor = 1.0
    if rope_type == "yarn":
        frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, device)
    else:
        if rope_type == "dynamic":
            counts = count_tokens(config, position_BT.shape[1], memory, attention_mask, "dynamic RoPE scaling")
            base = _stretched(config, base, counts)
        exponents_H = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        frequencies = 1.0 / base.to(device) ** exponents_H
    if rope_type == "linear":
        frequencies = frequencies / scaling["factor"]
    angles_B1TH = (position_BT.float()[..., None] * frequencies).unsqueeze(1)
    return angles_B1TH.cos() * factor, angles_B1TH.sin() * factor


def _stretched(config: BipeConfig, base: Tensor, counts_B1: Tensor) -> Tensor:
    trained, width, factor = config.train_len_tokens, config.head_dim, (config.rope_parameters or {})["factor"]
    stretch = factor * counts_B1[..., None].clamp(min=trained).double() / trained - (factor - 1)
    return (base * stretch ** (width / (width - 2))).float()
