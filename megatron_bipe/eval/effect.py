"""The effect of the paper in three small models: beyond the training length RoPE gets worse, the bilevel ones do not.

It shows where RoPE's loss in nats a token rises, at twice the training length by at least 3 times as much as
BiPE-RoPE's and at four times by at least 1.25 times as much, and BiPE-ALiBi's rises at neither. These bounds were fixed
before the quickstart was tuned; they leave room for what small models do, whose BiPE-RoPE holds to about twice the
training length.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

STRETCHES = (2, 4)  # lengths at which the effect is judged, in training lengths
RISE_RATIOS = (3.0, 1.25)  # at least so many times as much as BiPE-RoPE's is RoPE's rise there


class ExtrapolationEffect(NamedTuple):
    """How losses change from the training length to each of `STRETCHES`."""

    rises_nats: Mapping[str, tuple[float, float]]
    """By encoding: loss there less the loss at the training length, in nats a token; negative: it fell."""

    @property
    def ratios(self) -> tuple[float, float]:
        """RoPE's rise over BiPE-RoPE's; infinite where RoPE's alone rises, 0 where RoPE's does not."""
        pairs = zip(self.rises_nats["rope"], self.rises_nats["bipe_rope"], strict=True)
        twice, four_times = (0.0 if rope <= 0 else rope / bipe if bipe > 0 else math.inf for rope, bipe in pairs)
        return twice, four_times

    @property
    def rope_breaks(self) -> tuple[bool, bool]:
        """True where RoPE's loss rises by enough times as much as BiPE-RoPE's."""
        twice, four_times = (ratio >= least for ratio, least in zip(self.ratios, RISE_RATIOS, strict=True))
        return twice, four_times

    @property
    def alibi_holds(self) -> bool:
        """True if BiPE-ALiBi's loss rises at none of the lengths."""
        return all(rise <= 0 for rise in self.rises_nats["bipe_alibi"])

    @property
    def shows(self) -> bool:
        """True if the effect shows in all its parts."""
        return all(self.rope_breaks) and self.alibi_holds


def extrapolation_effect(nats: Mapping[str, Mapping[int, float]], train_len_tokens: int) -> ExtrapolationEffect:
    """Compare losses at 2 and 4 times the training length with those at the training length.

    Args:
        nats: encoding -> window length in tokens -> loss in nats a token; `rope`, `bipe_rope` and `bipe_alibi`, at
            least at these three lengths.
        train_len_tokens: the training length.
    """
    rises = {}
    for encoding, by_length in nats.items():
        twice, four_times = (by_length[stretch * train_len_tokens] for stretch in STRETCHES)
        rises[encoding] = (twice - by_length[train_len_tokens], four_times - by_length[train_len_tokens])
    return ExtrapolationEffect(rises)
