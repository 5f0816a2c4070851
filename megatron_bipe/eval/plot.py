"""Perplexity against window length: linear axes, lines labelled where they end, exploding ones cut and named."""

import io
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision; markers repeat the distinction without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))  # for each row of the palette
GREY = "#666666"
CLIP_FACTOR = 2.5  # perplexities beyond so many times the worst one at the training length leave the plot
LABEL_GAP = 0.055  # of the plot's height, between labels


class Curve(NamedTuple):
    """One model's line."""

    name: str
    train_len_tokens: int
    points: Sequence[tuple[float, float]]
    """(window length, perplexity), ascending."""


def draw_perplexity(curves: Sequence[Curve], title: str) -> bytes:
    """The plot as PNG, about 1280 x 720 pixels; wider where names are long."""
    figure = Figure(figsize=(8.0, 4.75), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.075, 0.15, 0.745, 0.70))
    low, high = visible_range(curves)
    axes.set_ylim(low, high)
    for index, curve in enumerate(curves):
        lengths, values = zip(*curve.points, strict=True)
        # Matplotlib draws no line towards infinity; this one is to be seen leaving.
        drawn = [min(value, 100 * high) for value in values]
        axes.plot(lengths, drawn, linewidth=2, markersize=5, **line_style(index))
    _draw_frame(axes, curves, title)
    _label_lines(axes, curves)
    beyond = values_beyond(curves, high)
    if beyond:
        note = textwrap.fill("Beyond the plot: " + beyond, width=125)
        figure.text(0.075, 0.045, note, va="top", fontsize=8, color=GREY)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})
    return buffer.getvalue()


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line with this number; the palette comes again with other markers and dashes."""
    row, place = divmod(index, len(COLOURS))
    marker, dashes = MARKERS[(place + row) % len(MARKERS)], DASHES[row % len(DASHES)]
    return {"color": COLOURS[place], "marker": marker, "linestyle": dashes}


def visible_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Limits of the perplexity axis: everything, unless a line explodes beyond what the others need."""
    at_training = [min(c.points, key=lambda point: abs(point[0] - c.train_len_tokens))[1] for c in curves]
    values = [value for curve in curves for _, value in curve.points]
    low, sensible = min(values), CLIP_FACTOR * max(at_training)
    top = max(values) if max(values) <= sensible else sensible
    room = max(top - low, 0.3 * low)  # noise shall not look like an effect
    return max(0.0, low - 0.12 * room), top if top < max(values) else low + 1.08 * room


def values_beyond(curves: Sequence[Curve], high: float) -> str:
    """The values that the plot cannot show, in words; empty where there are none."""
    parts = []
    for curve in curves:
        gone = [f"{_rounded(value)} at {length:,}" for length, value in curve.points if value > high]
        if gone:
            parts.append(f"{curve.name} {', '.join(gone)}")
    return "; ".join(parts)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights at least `gap` apart, in the order of `wanted` and near them."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for before, here in pairwise(order):
        placed[here] = max(placed[here], placed[before] + gap)
    # Pushed upwards only; moving all back by the mean push keeps the labels around their lines.
    push = sum(p - w for p, w in zip(placed, wanted, strict=True)) / max(len(wanted), 1)
    return [height - push for height in placed]


def thin_ticks(lengths: Sequence[float], always: Sequence[float], smallest_gap: float) -> list[float]:
    """The lengths whose labels fit side by side; those in `always` come first, longer ones next."""
    kept: list[float] = []
    for length in [*sorted(always), *sorted(set(lengths), reverse=True)]:
        if all(abs(length - other) >= smallest_gap for other in kept):
            kept.append(length)
    return sorted(kept)


def _draw_frame(axes: Axes, curves: Sequence[Curve], title: str) -> None:
    lengths = sorted({length for curve in curves for length, _ in curve.points})
    trained = sorted({curve.train_len_tokens for curve in curves})
    first, last = min(lengths[0], *trained), max(lengths[-1], *trained)
    margin = 0.03 * max(last - first, 0.1 * last)
    axes.set_xlim(first - margin, last + margin)
    axes.set_xticks(thin_ticks(lengths, [t for t in trained if t in lengths], 0.055 * (last - first)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for length in trained:
        axes.axvline(length, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        side = "left" if length - first < 0.15 * (last - first) else "center"
        axes.text(
            length, 1.015, "training length", transform=axes.get_xaxis_transform(), ha=side, fontsize=8, color=GREY
        )
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=20)
    axes.set_xlabel("window length, tokens", fontsize=9)
    axes.set_ylabel("perplexity (lower is better)", fontsize=9)
    axes.tick_params(labelsize=8.5, length=3)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_lines(axes: Axes, curves: Sequence[Curve]) -> None:
    """Names beside the ends of lines; a line that leaves the plot is named where it does."""
    low, high = axes.get_ylim()
    staying = [(i, curve) for i, curve in enumerate(curves) if curve.points[-1][1] <= high]
    ends = [(curve.points[-1][1] - low) / (high - low) for _, curve in staying]
    for (index, curve), height in zip(staying, spread(ends, LABEL_GAP), strict=True):
        place = (curve.points[-1][0], low + height * (high - low))
        _write_name(axes, index, curve.name, place, (9, 0), va="center")
    leaving = [(i, curve) for i, curve in enumerate(curves) if curve.points[-1][1] > high]
    for row, (index, curve) in enumerate(sorted(leaving, key=lambda item: _leaves_at(item[1], high))):
        _write_name(axes, index, f"{curve.name} \u2191", (_leaves_at(curve, high), high), (7, -4 - 14 * row), va="top")


def _leaves_at(curve: Curve, high: float) -> float:
    """Length at which a line crosses the top for the last time on its way out."""
    for (x0, y0), (x1, y1) in reversed(list(pairwise(curve.points))):
        if y0 <= high < y1:
            return x0 + (x1 - x0) * (high - y0) / (min(y1, 100 * high) - y0)
    return curve.points[0][0]


def _write_name(
    axes: Axes, index: int, name: str, place: tuple[float, float], offset: tuple[float, float], va: str
) -> None:
    axes.annotate(
        name,
        place,
        xytext=offset,
        textcoords="offset points",
        va=va,
        color=COLOURS[index % len(COLOURS)],
        fontsize=9.5,
        fontweight="bold",
        annotation_clip=False,
    )


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}" if value < float("inf") else "infinite"
