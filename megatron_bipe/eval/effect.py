"""Check of the paper's effect in small models: beyond the training length RoPE degrades and bilevel encodings do not.

The effect shows if RoPE's loss in nats per token rises by at least 3 times as much as BiPE-RoPE's at twice the training
length and by at least 1.25 times as much at four times, and if BiPE-ALiBi's rises at neither. These bounds were fixed
before the quickstart was tuned; they allow for small models, whose BiPE-RoPE holds to about twice the training length.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

STRETCHES = (2, 4)  # evaluated lengths, in multiples of the training length
RISE_RATIOS = (3.0, 1.25)  # smallest ratio of RoPE's rise to BiPE-RoPE's at each of them


class ExtrapolationEffect(NamedTuple):
    """Changes of the losses from the training length to each of `STRETCHES`."""

    rises_nats: Mapping[str, tuple[float, float]]
    """By encoding: loss there minus the loss at the training length, in nats per token; negative if it fell."""

    @property
    def ratios(self) -> tuple[float, float]:
        """RoPE's rise over BiPE-RoPE's; infinite if only RoPE's rises, 0 if RoPE's does not."""
        pairs = zip(self.rises_nats["rope"], self.rises_nats["bipe_rope"], strict=True)
        twice, four_times = (0.0 if rope <= 0 else rope / bipe if bipe > 0 else math.inf for rope, bipe in pairs)
        return twice, four_times

    @property
    def rope_breaks(self) -> tuple[bool, bool]:
        """True where the ratio reaches its bound in `RISE_RATIOS`."""
        twice, four_times = (ratio >= least for ratio, least in zip(self.ratios, RISE_RATIOS, strict=True))
        return twice, four_times

    @property
    def alibi_holds(self) -> bool:
        """True if BiPE-ALiBi's loss rises at none of the lengths."""
        return all(rise <= 0 for rise in self.rises_nats["bipe_alibi"])

    @property
    def shows(self) -> bool:
        return all(self.rope_breaks) and self.alibi_holds


def extrapolation_effect(nats: Mapping[str, Mapping[int, float]], train_len_tokens: int) -> ExtrapolationEffect:
    """Compare losses at 2 and 4 times the training length with those at the training length.

    Args:
        nats: encoding -> sequence length in tokens -> loss in nats per token; `rope`, `bipe_rope` and `bipe_alibi`, at
            least at these three lengths.
        train_len_tokens: the training length.
    """
    rises = {}
    for encoding, by_length in nats.items():
        twice, four_times = (by_length[stretch * train_len_tokens] for stretch in STRETCHES)
        rises[encoding] = (twice - by_length[train_len_tokens], four_times - by_length[train_len_tokens])
    return ExtrapolationEffect(rises)
