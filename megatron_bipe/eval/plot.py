"""Plot of perplexity against sequence length: linear axes, labelled line ends, clipped outliers listed in a note."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_bipe.eval.curves import COLOURS, Curve, leaves_at, spread, thin_ticks, values_beyond, visible_range

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))  # per repetition of the palette
GREY = "#666666"
LABEL_GAP = 0.055  # between labels, as a fraction of the plot's height


def draw_perplexity(curves: Sequence[Curve], title: str) -> bytes:
    """Return the plot as PNG, about 1280 x 720 pixels; wider if names are long."""
    figure = Figure(figsize=(8.0, 4.75), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.075, 0.15, 0.745, 0.70))
    low, high = visible_range(curves)
    axes.set_ylim(low, high)
    for index, curve in enumerate(curves):
        lengths, values = zip(*curve.points, strict=True)
        # Matplotlib cannot draw to infinity; a finite value shows the line leaving the plot.
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
    """Return colour, marker and dashes of a line; when the palette repeats, markers and dashes differ."""
    row, position = divmod(index, len(COLOURS))
    marker, dashes = MARKERS[(position + row) % len(MARKERS)], DASHES[row % len(DASHES)]
    return {"color": COLOURS[position], "marker": marker, "linestyle": dashes}


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
    axes.set_xlabel("sequence length, tokens", fontsize=9)
    axes.set_ylabel("perplexity (lower is better)", fontsize=9)
    axes.tick_params(labelsize=8.5, length=3)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_lines(axes: Axes, curves: Sequence[Curve]) -> None:
    """Write names at line ends; a line that leaves the plot is named where it leaves."""
    low, high = axes.get_ylim()
    staying = [(i, curve) for i, curve in enumerate(curves) if curve.points[-1][1] <= high]
    ends = [(curve.points[-1][1] - low) / (high - low) for _, curve in staying]
    for (index, curve), height in zip(staying, spread(ends, LABEL_GAP), strict=True):
        position = (curve.points[-1][0], low + height * (high - low))
        _write_name(axes, index, curve.name, position, (9, 0), va="center")
    leaving = [(i, curve) for i, curve in enumerate(curves) if curve.points[-1][1] > high]
    for row, (index, curve) in enumerate(sorted(leaving, key=lambda item: leaves_at(item[1].points, high))):
        position = (leaves_at(curve.points, high), high)
        _write_name(axes, index, f"{curve.name} \u2191", position, (7, -4 - 14 * row), va="top")


def _write_name(
    axes: Axes, index: int, name: str, position: tuple[float, float], offset: tuple[float, float], va: str
) -> None:
    axes.annotate(
        name,
        position,
        xytext=offset,
        textcoords="offset points",
        va=va,
        color=COLOURS[index % len(COLOURS)],
        fontsize=9.5,
        fontweight="bold",
        annotation_clip=False,
    )
