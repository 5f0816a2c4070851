"""Relative encodings: each one turns (queries, keys, positions) into (queries, keys), and nothing else.

Attention after them is stock causal attention, whatever the encoding. `positions_BT` is the inter-segment
id for the bilevel models and the token's place for the others; the encodings cannot tell.

    B batch · T positions · N query heads · G key/value heads · H head width · E widened head
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.errors import ConfigError

BIPE_ALIBI_SLOPE_FACTOR = 96.0  # the paper's: segments are further apart than tokens
_BF16_INTEGERS = 256  # bf16 and every wider float hold all integers up to here exactly
MAX_BIASED_POSITIONS = _BF16_INTEGERS**2
_CHANNELS = 7
_OWN_UNIT = 1024  # keeps the query's channel within fp16: slopes of 400 times 65,536 positions


class RelativeEncoding(Protocol):
    """What attention needs of an encoding."""

    def __call__(self, q_BNTH: Tensor, k_BGTH: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded queries and keys; their last width may have grown (equally, to a multiple of 8)."""


def make_encoding(config: ModelConfig, first_head: int = 0, num_heads: int | None = None) -> RelativeEncoding:
    """The relative encoding that `config.encoding` names, for `num_heads` query heads (all) from `first_head` on."""
    if config.encoding in ("rope", "bipe_rope"):
        return Rotary(config)
    factor = BIPE_ALIBI_SLOPE_FACTOR if config.bilevel else 1.0
    slopes_N = torch.tensor(alibi_slopes(config.num_heads)) * factor
    return KeyBias(slopes_N.narrow(0, first_head, num_heads or config.num_heads), config.head_width)


def bias_channels(config: ModelConfig) -> int:
    """By how much the encoding widens heads."""
    return 0 if config.encoding in ("rope", "bipe_rope") else _widening(config.head_width)


class Rotary:
    """RoPE in the half-rotation layout, with optional linear or dynamic scaling.

    Source: Su et al. 2021 (arXiv 2104.09864); scaling as in transformers' `linear` and `dynamic` types.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __call__(self, q_BNTH: Tensor, k_BGTH: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate pairs (i, i + H/2) of queries and keys by position x frequency i."""
        cos_B1TH, sin_B1TH = self.tables(positions_BT, q_BNTH.dtype)
        return _rotate(q_BNTH, cos_B1TH, sin_B1TH), _rotate(k_BGTH, cos_B1TH, sin_B1TH)

    def tables(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, 1, T, H/2]; angles are computed in fp32."""
        scaling = self.config.rope_scaling
        angle_of = positions_BT.to(torch.float32)
        if scaling is not None and scaling.type == "linear":
            angle_of = angle_of / scaling.factor
        frequencies_H = self.frequencies(positions_BT.shape[-1]).to(positions_BT.device)
        angles_B1TH = (angle_of[..., None] * frequencies_H).unsqueeze(1)
        return angles_B1TH.cos().to(dtype), angles_B1TH.sin().to(dtype)

    def frequencies(self, window_tokens: int) -> Tensor:
        """Radians per position, fp32 [H/2]; dynamic scaling raises the base for windows beyond training."""
        width, base = self.config.head_width, self.config.rope_base
        scaling, trained = self.config.rope_scaling, self.config.train_len_tokens
        if scaling is not None and scaling.type == "dynamic" and window_tokens > trained:
            stretch = scaling.factor * window_tokens / trained - (scaling.factor - 1)
            base = base * stretch ** (width / (width - 2))
        return 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)


def _rotate(x_BNTH: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor) -> Tensor:
    first, second = x_BNTH.chunk(2, dim=-1)
    return torch.cat((first * cos_B1TH - second * sin_B1TH, second * cos_B1TH + first * sin_B1TH), dim=-1)


def alibi_slopes(num_heads: int) -> list[float]:
    """One slope a head: a geometric row from 2^(-8/n); for other counts, padded from the next power of two.

    Source: Press et al. 2022 (arXiv 2108.12409); rows fixed by tests/golden/alibi_slopes.json.
    """
    lower = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / lower) for i in range(lower)]
    between = [2.0 ** (-8.0 * (i + 1) / (2 * lower)) for i in range(0, 2 * lower, 2)]
    return slopes + between[: num_heads - lower]


class KeyBias:
    """ALiBi as channels of queries and keys, so that attention itself needs no bias.

    Softmax ignores what is constant along the keys, so slope x (key position - query position) may be
    replaced by slope x (key position - last position): a product of something the head knows and something
    the key knows, that is a few more channels in the dot product. bf16 holds 8 significant bits, so the
    slope goes in three parts (24 bits) and the position in two exact ones: 6 channels. A seventh is the query's
    and takes off what its own position gives, so that scores near the query stay small; how it is rounded
    does not matter, since it is the same for all keys. The channels come before the head's own and the largest come
    first: kernels add in that order, and the large numbers have cancelled before anything small is added. Queries
    hold the slopes, so keys stay shared by grouped queries.
    """

    def __init__(self, slopes_N: Tensor, head_width: int) -> None:
        # Attention multiplies scores by 1/sqrt(H); the bias must come through unscaled.
        self.slopes_N = slopes_N.to(torch.float32) * math.sqrt(head_width)

    def __call__(self, q_BNTH: Tensor, k_BGTH: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after the bias channels, the width filled up by zeros."""
        num_tokens = positions_BT.shape[-1]
        if num_tokens > MAX_BIASED_POSITIONS:
            raise ConfigError(
                f"a window of {num_tokens} tokens exceeds the {MAX_BIASED_POSITIONS} that ALiBi's exact key bias holds",
                remedy="Use a shorter window",
                place="train.seq_len_tokens or --lengths",
            )
        slopes_N = self.slopes_N.to(q_BNTH.device)
        back_BT = positions_BT[:, -1:] - positions_BT  # segments or tokens before the last key, >= 0
        coarse_BT = back_BT // _BF16_INTEGERS * _BF16_INTEGERS
        fine_BT, unit_BT = back_BT - coarse_BT, torch.full_like(back_BT, -_OWN_UNIT)
        own_BNT = slopes_N[:, None] / _OWN_UNIT * back_BT[:, None]
        high, middle, low = (part_N[:, None].expand_as(own_BNT) for part_N in _bf16_parts(slopes_N))
        queries = [high, own_BNT, high, middle, middle, low, low]
        keys = [coarse_BT, unit_BT, fine_BT, coarse_BT, fine_BT, coarse_BT, fine_BT]
        pad = _widening(q_BNTH.shape[-1]) - _CHANNELS
        q_BNT7, k_BT7 = torch.stack(queries, dim=-1), torch.stack(keys, dim=-1).neg()
        return _prepend(q_BNT7, q_BNTH, pad), _prepend(k_BT7[:, None], k_BGTH, pad)


def _widening(head_width: int) -> int:
    """The channels, and what fills the width up to a multiple of 8."""
    return _CHANNELS + -(head_width + _CHANNELS) % 8


def _bf16_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three fp32 tensors that bf16 represents exactly and that sum to `x` within 2^-24."""
    high = x.bfloat16().float()
    middle = (x - high).bfloat16().float()
    return high, middle, (x - high - middle).bfloat16().float()


def _prepend(channels_BNTC: Tensor, x_BNTH: Tensor, pad: int) -> Tensor:
    channels_BNTC = channels_BNTC.to(x_BNTH.dtype).expand(*x_BNTH.shape[:-1], -1)
    return torch.nn.functional.pad(torch.cat((channels_BNTC, x_BNTH), dim=-1), (0, pad))
