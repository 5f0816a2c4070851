"""Formulas of the positional encodings. This file imports only torch, nothing else of the project.

The model's encodings (`rotary.py`, `bias.py`, `absolute.py`) apply them to positions of full sequences. An exported
model contains a copy of this file, `functional_bipe.py`; its encodings (`hf/encodings_bipe.py`) apply them to the
positions in its cache.

B batch · T positions · S keys · N query heads · H head width · D width
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", float, Tensor)

BILEVEL_ALIBI_FACTOR = 96.0  # multiplies slopes over segments, which are further apart than tokens (as in the paper)
MAX_ALIBI_POSITIONS = 2**16  # ALiBi's channels are exact up to this position
MAX_XPOS_TOKENS = 2**14  # xPos stays within the range of bf16 and fp32 up to this length
NUM_T5_BUCKETS = 32
BIAS_CHANNELS = 16  # width of ALiBi's channels in queries and keys
_ALIBI_UNIT = 1024  # keeps the query's channel within fp16: slopes of 400 times 65,536 positions
_BF16_INTEGERS = 256  # bf16 and every wider float represent all integers up to this one exactly
_T5_MAX_DISTANCE = 128  # this and all larger distances share the last bucket
_XPOS_POSITIONS, _XPOS_GAMMA = 512, 0.4  # as published


def alibi_slopes(num_heads: int) -> list[float]:
    """Return one slope per head: powers of 2^(-8/n); other counts are extended by slopes of the next power of two.

    Source: Press et al. 2022 (arXiv 2108.12409); values are fixed by tests/golden/alibi_slopes.json.
    """
    lower = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / lower) for i in range(lower)]
    between = [2.0 ** (-8.0 * (i + 1) / (2 * lower)) for i in range(0, 2 * lower, 2)]
    return slopes + between[: num_heads - lower]


def alibi_key_channels(back_BS: Tensor) -> Tensor:
    """Return the 7 bias channels of keys, int64 [B, S, 7]; see `model.positions.bias.KeyBias`.

    Args:
        back_BS: distance of each key to the last one, int64, in positions.
    """
    coarse_BS = back_BS // _BF16_INTEGERS * _BF16_INTEGERS
    fine_BS, unit_BS = back_BS - coarse_BS, torch.full_like(back_BS, -_ALIBI_UNIT)
    return -torch.stack([coarse_BS, unit_BS, fine_BS, coarse_BS, fine_BS, coarse_BS, fine_BS], dim=-1)


def alibi_query_channels(slopes_N1: Tensor, back_B1T: Tensor) -> Tensor:
    """Return the 7 bias channels of queries, fp32 [B, N, T, 7].

    Args:
        slopes_N1: slopes, fp32, multiplied by sqrt(H), by which attention divides scores.
        back_B1T: distance of each query to the last key, in positions.
    """
    own_BNT = slopes_N1 / _ALIBI_UNIT * back_B1T
    high, middle, low = (part_N1.expand_as(own_BNT) for part_N1 in _bf16_parts(slopes_N1))
    return torch.stack([high, own_BNT, high, middle, middle, low, low], dim=-1)


def _bf16_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split `x` into three fp32 tensors that bf16 represents exactly and that sum to `x` within 2^-24."""
    high = x.bfloat16().float()
    middle = (x - high).bfloat16().float()
    return high, middle, (x - high - middle).bfloat16().float()


def spread_channels(channels: Tensor) -> Tensor:
    """Return 7 bias channels as 16: a zero after each of them, and two more at the end.

    AMX sums even and odd channels separately. Tensor cores add 16 products at a time, after they have aligned them to
    the largest one, so a product of the head itself must not be among those of the bias.
    """
    spread = torch.stack([channels, torch.zeros_like(channels)], dim=-1).flatten(-2)
    return torch.nn.functional.pad(spread, (0, BIAS_CHANNELS - spread.shape[-1]))


def rotary_frequencies(head_width: int, base: float | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return radians per position for each pair of channels, fp32 [..., H/2] (Su et al. 2021, arXiv 2104.09864).

    Args:
        head_width: H.
        base: base of the geometric sequence; a tensor [..., 1] gives one sequence per base.
        device: device of the result.
    """
    exponents_H = torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width
    return 1.0 / base**exponents_H


def stretched_base(base: float, head_width: int, factor: T) -> T:
    """Return the NTK base: its slowest pair rotates `factor` times slower, its fastest as before."""
    return base * factor ** (head_width / (head_width - 2))


def yarn_frequencies(
    frequencies_H: Tensor, base: float, factor: float, original_positions: int, betas: tuple[float, float]
) -> Tensor:
    """Return YaRN's frequencies: fast pairs unchanged, slow ones `factor` times slower, with a linear transition.

    Source: Peng et al. 2023 (arXiv 2309.00071).

    Args:
        frequencies_H: frequencies of the plain encoding, fp32 [H/2].
        base: base of the plain encoding.
        factor: context extension factor.
        original_positions: training length before the extension, in positions.
        betas: rotations over the original positions above which a pair is fast, and below which it is slow.
    """
    head_width = 2 * len(frequencies_H)

    def pair_that_turns(times: float) -> float:
        return head_width * math.log(original_positions / (times * 2 * math.pi)) / (2 * math.log(base))

    fast, slow = betas
    first = max(math.floor(pair_that_turns(fast)), 0)
    last = min(math.ceil(pair_that_turns(slow)), head_width - 1)
    pairs_H = torch.arange(len(frequencies_H), dtype=torch.float32, device=frequencies_H.device)
    slowed_H = ((pairs_H - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies_H / factor * slowed_H + frequencies_H * (1 - slowed_H)


def yarn_attention_factor(factor: float) -> float:
    """Return the factor of both queries and keys that keeps softmax over more keys as sharp."""
    return 0.1 * math.log(factor) + 1.0


def rotary_tables(positions_BT: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cosines and sines times `factor`, fp32 [B, 1, T, H/2]; frequencies are [H/2] or [B, 1, H/2]."""
    angles_B1TH = (positions_BT.float()[..., None] * frequencies).unsqueeze(1)
    return angles_B1TH.cos() * factor, angles_B1TH.sin() * factor


def rotate(x_BNTH: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor) -> Tensor:
    """Rotate pairs (i, i + H/2) of channels: the half-rotation layout."""
    if torch.compiler.is_compiling():
        return _rotate_in_one_kernel(x_BNTH, cos_B1TH, sin_B1TH)
    first, second = x_BNTH.chunk(2, dim=-1)
    return torch.cat((first * cos_B1TH - second * sin_B1TH, second * cos_B1TH + first * sin_B1TH), dim=-1)


def _rotate_in_one_kernel(x_BNTH: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor) -> Tensor:
    """Compute `rotate` without joining tensors, so that torch.compile makes one kernel of it and one of its gradient.

    The result is contiguous as [B, T, N, H]. Attention's output then is, too, and need not be copied.
    """
    x_BTN2H = x_BNTH.transpose(1, 2).unflatten(-1, (2, -1))
    cos_BT11H, sin_BT11H = (x_B1TH.transpose(1, 2).unsqueeze(-2) for x_B1TH in (cos_B1TH, sin_B1TH))
    signs_21 = torch.arange(-1, 2, 2, device=x_BNTH.device)[:, None]  # of sine in the two halves
    rotated_BTN2H = x_BTN2H * cos_BT11H + x_BTN2H.flip(-2) * (sin_BT11H * signs_21)
    return rotated_BTN2H.flatten(-2).transpose(1, 2)


def xpos_factors(positions_BT: Tensor, head_width: int, trained_tokens: int) -> tuple[Tensor, Tensor]:
    """Return xPos's factors of queries and of keys, zeta^(position/512) and its inverse, fp32 [B, 1, T, H/2].

    Exponents are relative to the middle of the training length, an offset that cancels in every score. The zeta of pair
    i is (2 i / H + gamma) / (1 + gamma), from 0.29 to almost 1.

    Source: Sun et al. 2022 (arXiv 2212.10554).
    """
    pairs_H = torch.arange(0, head_width, 2, device=positions_BT.device) / head_width
    zetas_H = (pairs_H + _XPOS_GAMMA) / (1 + _XPOS_GAMMA)
    powers_BT = (positions_BT - trained_tokens // 2).float() / _XPOS_POSITIONS
    logs_B1TH = (powers_BT[..., None] * zetas_H.log()).unsqueeze(1)
    return logs_B1TH.exp(), logs_B1TH.neg().exp()


def t5_buckets(distances: Tensor) -> Tensor:
    """Return the int64 bucket of each distance back to a key: exact in the first half of the buckets, then logarithmic.

    Source: Raffel et al. 2020 (arXiv 1910.10683), the buckets of its decoder.
    """
    exact = NUM_T5_BUCKETS // 2
    every = torch.arange(_T5_MAX_DISTANCE + 1, device=distances.device)
    steps = (every.clamp(min=exact) / exact).log() / math.log(_T5_MAX_DISTANCE / exact) * (NUM_T5_BUCKETS - exact)
    bucket_of = torch.where(every < exact, every, (exact + steps.long()).clamp(max=NUM_T5_BUCKETS - 1))
    return bucket_of[distances.clamp(0, _T5_MAX_DISTANCE)]


def sinusoids(positions_BT: Tensor, width: int) -> Tensor:
    """Return sines, then cosines of positions, fp32 [B, T, D], at wavelengths from 2 pi to 10000 x 2 pi.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5.
    """
    pairs = torch.arange(width // 2, device=positions_BT.device)
    angles = positions_BT.float()[..., None] * (pairs.float() * (-2 * math.log(10_000.0) / width)).exp()
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def log_scale_factors(positions_BT: Tensor, trained_tokens: int) -> Tensor:
    """Return `model.log_scale`'s factor of queries, ln(position + 1) / ln(training length), fp32 [B, 1, T, 1]."""
    return ((positions_BT + 1).float().log() / math.log(trained_tokens))[:, None, :, None]
