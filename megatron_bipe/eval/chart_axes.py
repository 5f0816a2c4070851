"""Drawing of a chart into axes of matplotlib; all sizes are multiples of the font size, in points."""

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from megatron_bipe.eval.chart_content import (
    MARKERS,
    Chart,
    Line,
    Style,
    line_styles,
    round_ticks,
    spread,
    thin_ticks,
    y_ticks,
)
from megatron_bipe.picture import COLOURS, DASHES, GREY, GRID, printable

PAPER = "#ffffff"
BAND_OPACITY = 0.18
LEAVES = "\u2191"  # after the name of a line that leaves the chart
CHARACTER, LINE_HEIGHT, TICK_GAP, MARKER_GAP = 0.6, 1.3, 3.5, 1.7  # in multiples of the font size


def draw_lines(axes: Axes, chart: Chart, font: float, axes_width: float) -> None:
    """Draw lines, bands, axes and grid; `axes_width` is in points."""
    low, high = chart.y_range
    axes.set_yscale("log" if chart.is_log else "linear")
    axes.minorticks_off()
    styled = list(zip(chart.lines, line_styles(chart.lines), strict=True))
    for line, style in sorted(styled, key=lambda item: bool(item[0].name)):  # background lines first
        look = line_look(line, style) | {"marker": ""}
        width = 0.19 if line.name and not line.is_published and _has_markers(line, font, axes_width) else 0.12
        look |= {"linewidth": width * font, "alpha": 1 if line.name else 0.5}
        axes.plot(*zip(*drawable(chart, line), strict=True), **look)
        if line.band:
            xs, lows, highs = zip(*line.band, strict=True)
            axes.fill_between(xs, lows, highs, color=look["color"], alpha=BAND_OPACITY, linewidth=0)
        _draw_markers(axes, chart, line, style, font, axes_width)
    axes.set_ylim(low, high)
    _draw_x_axis(axes, chart, font, axes_width)
    axes.set_yticks(*zip(*y_ticks(chart), strict=True))
    axes.set_ylabel(chart.y_label, fontsize=font, color=GREY)
    axes.tick_params(labelsize=0.95 * font, length=0.35 * font, color=GREY, labelcolor=GREY)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.09 * font)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)


def drawable(chart: Chart, line: Line) -> list[tuple[float, float]]:
    """Return finite points: matplotlib cannot draw to infinity, and a large value shows the line leaving the chart."""
    return [(x, min(y, 100 * chart.y_range[1])) for x, y in line.points]


def _draw_markers(axes: Axes, chart: Chart, line: Line, style: Style, font: float, axes_width: float) -> None:
    """Mark the points of a line, if there is room, and where it leaves the chart."""
    low, high = chart.y_range
    if not line.name:
        return
    shown = [(x, y) for x, y in line.points if low <= y <= high]
    if shown and _has_markers(line, font, axes_width):
        dots = line_look(line, style) | {"linestyle": "", "markersize": 0.66 * font, "markeredgewidth": 0.11 * font}
        if not style.is_hollow and not line.is_published:
            dots["markeredgecolor"] = PAPER  # separates dots that overlap
        axes.plot(*zip(*shown, strict=True), gid=f"dots:{chart.lines.index(line)}", **dots)
    last = [y for _, y in line.points if not math.isnan(y)][-1:]
    if last and last[0] > high and len(line.points) > 1:
        x, transform = leaves_at(chart, line.points), axes.get_xaxis_transform()
        arrow: dict[str, Any] = {"marker": "^", "markersize": 0.55 * font, "color": COLOURS[style.colour]}
        axes.plot([x], [0.97], zorder=4, linestyle="", transform=transform, **arrow)


def _has_markers(line: Line, font: float, axes_width: float) -> bool:
    """Return True if there is room for a marker at each point."""
    return axes_width >= MARKER_GAP * font * (len(line.points) - 1)


def _draw_x_axis(axes: Axes, chart: Chart, font: float, axes_width: float) -> None:
    trained = train_lengths(chart)
    xs = [*trained, *(x for line in chart.lines for x, _ in line.points)]
    first, last = min(xs), max(xs)
    margin = 0.03 * max(last - first, 0.1 * last) or 1.0
    axes.set_xlim(first - margin, last + margin)
    for length in trained:
        axes.axvline(length, color=GREY, linewidth=0.1 * font, linestyle=(0, (4, 3)), zorder=0)
    gap_pt = TICK_GAP * font
    gap = gap_pt / axes_width * (last - first)
    labelled = [length for length in trained if length in chart.x_ticks]
    if chart.x_ticks:
        ticks = thin_ticks(chart.x_ticks, labelled, gap)
    else:
        ticks = round_ticks(first, last, min(6, round(axes_width / gap_pt)))
    axes.set_xticks(ticks, [chart.show_x(x) for x in ticks])
    axes.set_xlabel(chart.x_label, fontsize=font, color=GREY)


def name_lines(axes: Axes, chart: Chart, font: float, axes_height: float) -> None:
    """Write names at line ends, or where a line leaves the chart; `axes_height` is in points."""
    _name_train_lengths(axes, chart, font)
    high = chart.y_range[1]
    ends = []
    for line, style in zip(chart.lines, line_styles(chart.lines), strict=True):
        points = [point for point in line.points if not math.isnan(point[1])]
        if line.name and points:
            ends.append((line.name, style, points))
    staying = [(name, style, points[-1]) for name, style, points in ends if points[-1][1] <= high]
    heights = spread([chart.height(y) for _, _, (_, y) in staying], LINE_HEIGHT * font / axes_height)
    too_low = max(0.0, -min(heights, default=0.0))
    for (name, style, (x, _)), height in zip(staying, heights, strict=True):
        _write_name(axes, name, style, font, (x, height + too_low, 0.85 * font, 0.0, "center"))
    leaving = sorted((leaves_at(chart, points), name, style) for name, style, points in ends if points[-1][1] > high)
    for row, (x, name, style) in enumerate(leaving):
        down = -font * (0.3 + LINE_HEIGHT * row)
        _write_name(axes, f"{name} {LEAVES}", style, font, (x, 1.0, 0.7 * font, down, "top"))


def _write_name(axes: Axes, name: str, style: Style, font: float, at: tuple[float, float, float, float, str]) -> None:
    """Write a name in its line's colour; `at` is x, height, offsets to the right and up in points, and alignment."""
    x, height, right, up, align = at
    axes.annotate(
        printable(name),
        (x, height),
        xycoords=("data", "axes fraction"),
        xytext=(right, up),
        textcoords="offset points",
        annotation_clip=False,
        va=align,
        color=COLOURS[style.colour],
        fontsize=1.04 * font,
        fontweight="bold",
    )


def _name_train_lengths(axes: Axes, chart: Chart, font: float) -> None:
    first, last = axes.get_xlim()
    for length in train_lengths(chart):
        side = "left" if length - first < 0.2 * (last - first) else "center"
        transform, size = axes.get_xaxis_transform(), 0.9 * font
        axes.text(length, 1.02, "training length", transform=transform, ha=side, fontsize=size, color=GREY)


def legend_entries(chart: Chart) -> dict[str, Artist]:
    """Return the entries of a legend by text for the named lines."""
    return {
        printable(line.name): Line2D([], [], markersize=4, linewidth=1.3, **line_look(line, style))
        for line, style in zip(chart.lines, line_styles(chart.lines), strict=True)
        if line.name
    }


def band_entry(chart: Chart) -> dict[str, Artist]:
    """Return the entry of the legend that says what bands are; empty without bands."""
    if not chart.band_label or not any(line.band for line in chart.lines):
        return {}
    return {f"shaded: {chart.band_label}": Patch(facecolor=GREY, alpha=2 * BAND_OPACITY, linewidth=0)}


def train_length_entry(chart: Chart) -> dict[str, Artist]:
    """Return the entry of the legend for the mark of the training length; empty without one."""
    mark = Line2D([], [], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    return {"training length": mark} if train_lengths(chart) else {}


def write_title(axes: Axes, chart: Chart, font: float, width: float, pad: float) -> None:
    """Write the title above the axes, in lines that fit `width`; `pad` is their distance, both in points."""
    title = "\n".join(textwrap.wrap(printable(chart.title), width=int(width / (0.82 * font))))
    axes.set_title(title or " ", loc="left", fontsize=1.2 * font, fontweight="bold", pad=pad)


def line_look(line: Line, style: Style) -> dict[str, Any]:
    """Return matplotlib's settings of a line."""
    colour = COLOURS[style.colour]
    if line.is_published:
        return {"color": colour, "marker": "x", "linestyle": ":"}
    look = {"color": colour, "marker": MARKERS[style.marker], "linestyle": DASHES[style.dashes]}
    return look | ({"markerfacecolor": PAPER} if style.is_hollow else {})


def train_lengths(chart: Chart) -> list[int]:
    return sorted({line.train_len_tokens for line in chart.lines if line.train_len_tokens is not None})


def leaves_at(chart: Chart, points: Sequence[tuple[float, float]]) -> float:
    """Return the x at which a line last rises above the chart."""
    top = 100 * chart.y_range[1]
    for (x0, y0), (x1, y1) in reversed(list(pairwise(points))):
        before, after = chart.height(y0), chart.height(min(y1, top))
        if before <= 1 < after:
            return x0 + (x1 - x0) * (1 - before) / (after - before)
    return points[0][0]
