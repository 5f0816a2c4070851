"""Perplexity curves and layout decisions common to all plots: range, ticks, label positions.

Free of torch and matplotlib: `plot` draws them as PNG, `line_chart` as SVG.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

# Okabe and Ito's palette, distinguishable with any colour vision; markers distinguish lines without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CLIP_FACTOR = 2.5  # upper limit of the plot, in multiples of the worst perplexity at the training length


class Curve(NamedTuple):
    """One model's line."""

    name: str
    train_len_tokens: int
    points: Sequence[tuple[float, float]]
    """(sequence length, perplexity), ascending."""


def visible_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return limits of the perplexity axis: all values, unless a line far exceeds the others."""
    at_training = [min(c.points, key=lambda point: abs(point[0] - c.train_len_tokens))[1] for c in curves]
    values = [value for curve in curves for _, value in curve.points]
    low = min(values)
    if math.isinf(low):  # every model diverged
        return 0.0, 1.0
    sensible = CLIP_FACTOR * max((value for value in at_training if math.isfinite(value)), default=low)
    top = max(values) if max(values) <= sensible else sensible
    room = max(top - low, 0.3 * low)  # noise must not look like an effect
    return max(0.0, low - 0.12 * room), top if top < max(values) else low + 1.08 * room


def values_beyond(curves: Sequence[Curve], high: float) -> str:
    """Describe the values that the plot cannot show; empty if there are none."""
    parts = []
    for curve in curves:
        gone = [f"{_rounded(value)} at {length:,}" for length, value in curve.points if value > high]
        if gone:
            parts.append(f"{curve.name} {', '.join(gone)}")
    return "; ".join(parts)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return heights at least `gap` apart, in the order of `wanted` and near them."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for before, here in pairwise(order):
        placed[here] = max(placed[here], placed[before] + gap)
    # Labels were pushed upwards only; subtracting the mean push centres them on their lines.
    push = sum(p - w for p, w in zip(placed, wanted, strict=True)) / max(len(wanted), 1)
    return [height - push for height in placed]


def thin_ticks(lengths: Sequence[float], always: Sequence[float], smallest_gap: float) -> list[float]:
    """Return the lengths whose labels fit next to each other; `always` has priority, then longer lengths."""
    kept: list[float] = []
    for length in [*sorted(always), *sorted(set(lengths), reverse=True)]:
        if all(abs(length - other) >= smallest_gap for other in kept):
            kept.append(length)
    return sorted(kept)


def leaves_at(points: Sequence[tuple[float, float]], high: float) -> float:
    """Return the x at which a line last rises above `high`."""
    for (x0, y0), (x1, y1) in reversed(list(pairwise(points))):
        if y0 <= high < y1:
            return x0 + (x1 - x0) * (high - y0) / (min(y1, 100 * high) - y0)
    return points[0][0]


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}" if value < float("inf") else "infinite"
