"""Rotary frequencies, as they are and stretched beyond the training length: the types of `model.rope_scaling`.

H head width
"""

import math

import torch
from torch import Tensor

from megatron_bipe.config.schema import ModelConfig, RopeScaling


def rotary_frequencies(config: ModelConfig, window_tokens: int) -> tuple[Tensor, float]:
    """How fast pairs of channels turn.

    Args:
        config: of the model.
        window_tokens: length of the windows at hand, which `dynamic` goes by.

    Returns:
        Radians a position, fp32 [H/2], and the factor of queries and keys.

    Source: linear, Chen et al. 2023 (arXiv 2306.15595); ntk, dynamic, yarn, Peng et al. 2023 (arXiv 2309.00071). A test
    compares all with transformers' functions.
    """
    scaling, base = config.rope_scaling, config.rope_base
    if scaling is None:
        return _turning(config, base), 1.0
    match scaling.type:
        case "linear":
            return _turning(config, base) / scaling.factor, 1.0
        case "ntk":
            return _turning(config, stretched_base(config, scaling.factor)), 1.0
        case "dynamic":
            excess = max(1.0, window_tokens / config.train_len_tokens)
            return _turning(config, stretched_base(config, scaling.factor * excess - (scaling.factor - 1))), 1.0
        case "yarn":
            return _yarn(config, scaling), yarn_attention_factor(scaling)


def stretched_base(config: ModelConfig, factor: float) -> float:
    """The base whose slowest pair turns `factor` times slower, and whose fastest turns as before."""
    if factor == 1.0:
        return config.rope_base
    return config.rope_base * factor ** (config.head_width / (config.head_width - 2))


def yarn_attention_factor(scaling: RopeScaling) -> float:
    """What queries and keys are each multiplied with, so that softmax over more keys stays as sharp."""
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def _turning(config: ModelConfig, base: float) -> Tensor:
    exponents_H = torch.arange(0, config.head_width, 2, dtype=torch.float32, device="cpu") / config.head_width
    return 1.0 / base**exponents_H


def _yarn(config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """Fast pairs as they are, slow ones `factor` times slower, a linear transition between."""
    frequencies_H = _turning(config, config.rope_base)
    original = scaling.original_positions or config.train_len_tokens

    def pair_that_turns(times: float) -> float:
        """Over the original positions; between pairs."""
        return config.head_width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(config.rope_base))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), config.head_width - 1)
    pairs_H = torch.arange(len(frequencies_H), dtype=torch.float32, device="cpu")
    slowed_H = ((pairs_H - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies_H / scaling.factor * slowed_H + frequencies_H * (1 - slowed_H)
