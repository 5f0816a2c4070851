"""Line charts, drawn with matplotlib: as PNG files, and as SVG inside pages, where they use the page's colours.

Lines differ in colour, dashes and marker. All sizes are multiples of the font size, in points; an SVG is drawn with one
point per CSS pixel, once for wide pages and once for phones, and the style sheet (`page.css`) shows one of them.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette, distinguishable with any colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
GREY, GRID, PAPER = "#666666", "#e6e6e6", "#ffffff"
PAGE_COLOURS = {colour: f"var(--line{number})" for number, colour in enumerate(COLOURS)} | {
    GREY: "var(--soft)",
    GRID: "var(--faint)",
    PAPER: "var(--page)",
}
CLIP_FACTOR = 2.5  # upper limit of a chart, in multiples of the worst perplexity at the training length
CHARACTER, LINE_HEIGHT, TICK_GAP, MARKER_GAP = 0.6, 1.3, 3.5, 1.7  # in multiples of the font size
PNG_FONT, PNG_HEIGHT, PNG_AXES_WIDTH, PNG_DPI = 9.0, 342.0, 440.0, 160
PAGE_FONT = 13.0
PAGE_SIZES = {"wide": (840.0, 400.0), "narrow": (358.0, 330.0)}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    """Label at the line's end; empty for a background line, which is thin and has no label or markers."""
    points: Sequence[tuple[float, float]]
    """(x, y), x ascending. NaN leaves a gap; infinite values leave the chart."""
    style: int = 0
    """Index of its colour, dashes and marker; the palette repeats."""
    train_len_tokens: int | None = None
    """The model's training length, which is marked on the x axis."""
    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high), x ascending, shaded in the line's colour; `Chart.band_label` says what it is."""
    is_published: bool = False
    """True for values of the paper, which are drawn thin and dotted."""
    encoding: str = ""
    """The model's encoding, which determines the colour in every figure; empty: `style` does."""


class Chart(NamedTuple):
    """Content of a chart."""

    lines: Sequence[Line]
    x_label: str
    y_label: str
    y_range: tuple[float, float]
    """Limits of the vertical axis; lines are clipped there."""
    x_ticks: Sequence[float] = ()
    """Values to label, thinned if they do not fit; empty: round numbers."""
    title: str = ""
    note: str = ""
    """Remark about values that the chart does not show; pages have it in the caption."""
    show_x: Callable[[float], str] = "{:,.0f}".format
    band_label: str = ""
    """Meaning of the bands, such as "range of 3 seeds"; it is in the legend."""


def perplexity_chart(lines: Sequence[Line], title: str = "", x_label: str = "sequence length, tokens") -> Chart:
    """Return a chart of perplexities that a diverging line does not stretch."""
    low, high = visible_range(lines)
    lengths = sorted({round(x) for line in lines for x, _ in line.points})
    beyond = values_beyond(lines, high)
    note = f"Beyond the chart: {beyond}" if beyond else ""
    return Chart(lines, x_label, "perplexity (lower is better)", (low, high), lengths, title, note)


def draw_png(chart: Chart) -> bytes:
    """Return a chart of about 1280 x 760 pixels; it is wider if names are long."""
    note = textwrap.wrap(chart.note, width=125)
    left, right = _margins(chart, PNG_FONT)
    left += 1.8 * PNG_FONT  # label of the axis
    width = PNG_AXES_WIDTH + left + right
    margins = (left, right, 4.2 * PNG_FONT, PNG_FONT * (4 + 1.4 * len(note)))
    figure = _single(chart, (width, PNG_HEIGHT), margins, PNG_FONT)
    _write_title(figure.axes[0], chart, PNG_FONT, pad=2.2 * PNG_FONT)
    height = 1.1 * PNG_FONT * len(note)
    figure.text(left / width, height / PNG_HEIGHT, "\n".join(note), va="top", fontsize=8, color=GREY)
    return _save_png(figure, PNG_DPI)


def draw_panels(rows: Sequence[Sequence[Chart]]) -> bytes:
    """Return a PNG of charts in rows and columns, with one legend for all."""
    num_columns = len(rows[0])
    figure = Figure(figsize=(1.2 + 4.6 * num_columns, 4.0 * len(rows)), facecolor="white", layout="constrained")
    handles: dict[str, Line2D] = {}
    for row, charts in zip(figure.subplots(len(rows), num_columns, squeeze=False), rows, strict=True):
        for axes, chart in zip(row, charts, strict=True):
            _draw(axes, chart, PNG_FONT, axes_width=300)
            note = textwrap.wrap(chart.note, width=72)
            _write_title(axes, chart, PNG_FONT, pad=PNG_FONT * (1 + len(note)))
            axes.text(0, 1.01, "\n".join(note), transform=axes.transAxes, fontsize=7, color=GREY)
            handles |= {line.name: Line2D([], [], label=line.name, **_style(line)) for line in chart.lines}
    figure.legend(handles=handles.values(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return _save_png(figure, dpi=130)


def draw_svg(chart: Chart, summary: str) -> str:
    """Return two `<svg>` elements, classes `wide` and `narrow`; `summary` is their text for screen readers."""
    return "".join(_as_page_svg(chart, kind, summary) for kind in PAGE_SIZES)


def visible_range(lines: Sequence[Line]) -> tuple[float, float]:
    """Return limits of the perplexity axis: all values, unless a line far exceeds the others."""
    at_training = [
        min(line.points, key=lambda point: abs(point[0] - (line.train_len_tokens or 0)))[1] for line in lines
    ]
    values = [value for line in lines for _, value in line.points]
    low = min(values)
    if math.isinf(low):  # every model diverged
        return 0.0, 1.0
    sensible = CLIP_FACTOR * max((value for value in at_training if math.isfinite(value)), default=low)
    top = max(values) if max(values) <= sensible else sensible
    room = max(top - low, 0.3 * low)  # noise must not look like an effect
    return max(0.0, low - 0.12 * room), top if top < max(values) else low + 1.08 * room


def values_beyond(lines: Sequence[Line], high: float) -> str:
    """Describe the values that the chart cannot show; empty if there are none."""
    parts = []
    for line in lines:
        gone = [f"{_rounded(value)} at {length:,.0f}" for length, value in line.points if value > high]
        if gone:
            parts.append(f"{line.name} {', '.join(gone)}")
    return "; ".join(parts)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return heights at least `gap` apart, in the order of `wanted` and near them."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    heights = list(wanted)
    for before, here in pairwise(order):
        heights[here] = max(heights[here], heights[before] + gap)
    # Labels were pushed upwards only; subtracting the mean push centres them on their lines.
    push = sum(height - want for height, want in zip(heights, wanted, strict=True)) / max(len(wanted), 1)
    return [height - push for height in heights]


def thin_ticks(lengths: Sequence[float], always: Sequence[float], smallest_gap: float) -> list[float]:
    """Return the lengths whose labels fit next to each other; `always` has priority, then longer lengths."""
    kept: list[float] = []
    for length in [*sorted(always), *sorted(set(lengths), reverse=True)]:
        if all(abs(length - other) >= smallest_gap for other in kept):
            kept.append(length)
    return sorted(kept)


def round_ticks(low: float, high: float, at_most: int) -> list[float]:
    """Return at most `at_most` multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    locator = MaxNLocator(at_most - 1, steps=[1, 2, 5, 10])
    return [float(value) for value in locator.tick_values(low, high) if low <= value <= high]


def _leaves_at(points: Sequence[tuple[float, float]], high: float) -> float:
    """Return the x at which a line last rises above `high`."""
    for (x0, y0), (x1, y1) in reversed(list(pairwise(points))):
        if y0 <= high < y1:
            return x0 + (x1 - x0) * (high - y0) / (min(y1, 100 * high) - y0)
    return points[0][0]


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}" if value < float("inf") else "infinite"


def _single(chart: Chart, size: tuple[float, float], margins: tuple[float, float, float, float], font: float) -> Figure:
    """Draw one chart with names at its line ends; margins are left, right, top and bottom."""
    (width, height), (left, right, top, bottom) = size, margins
    figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
    axes_width, axes_height = width - left - right, height - top - bottom
    axes = figure.add_axes((left / width, bottom / height, axes_width / width, axes_height / height))
    _draw(axes, chart, font, axes_width)
    _name_lines(axes, chart, font, axes_height)
    return figure


def _margins(chart: Chart, font: float) -> tuple[float, float]:
    """Return room for the numbers left of the axes, and for the names right of it."""
    numbers = max((len(text) for _, text in _y_ticks(chart)), default=0)
    names = max((len(line.name) for line in chart.lines), default=0)
    return font * (1.1 + CHARACTER * numbers), font * (1.7 + 1.04 * CHARACTER * names)


def _draw(axes: Axes, chart: Chart, font: float, axes_width: float) -> None:
    low, high = chart.y_range
    for line in sorted(chart.lines, key=lambda line: bool(line.name)):  # background lines first
        style = _style(line) | {"marker": ""}
        # Matplotlib cannot draw to infinity; a finite value shows the line leaving the chart.
        drawn = [(x, min(y, 100 * high)) for x, y in line.points]
        width = 0.19 if line.name and not line.is_published else 0.12
        axes.plot(*zip(*drawn, strict=True), linewidth=width * font, alpha=1 if line.name else 0.5, **style)
        if line.band:
            axes.fill_between(*zip(*line.band, strict=True), color=style["color"], alpha=0.18, linewidth=0)
        shown = [(x, y) for x, y in line.points if low <= y <= high]
        if line.name and shown and axes_width >= MARKER_GAP * font * (len(line.points) - 1):
            edge = style["color"] if line.is_published else PAPER  # separates dots that overlap
            dots = _style(line) | {"linestyle": "", "markersize": 0.6 * font, "markeredgecolor": edge}
            axes.plot(*zip(*shown, strict=True), gid=f"dots:{chart.lines.index(line)}", **dots)
    axes.set_ylim(low, high)
    trained = _train_lengths(chart)
    xs = [*trained, *(x for line in chart.lines for x, _ in line.points)]
    first, last = min(xs), max(xs)
    margin = 0.03 * max(last - first, 0.1 * last) or 1.0
    axes.set_xlim(first - margin, last + margin)
    for length in trained:
        axes.axvline(length, color=GREY, linewidth=0.1 * font, linestyle=(0, (4, 3)), zorder=0)
    gap = TICK_GAP * font / axes_width * (last - first)
    labelled = [length for length in trained if length in chart.x_ticks]
    ticks = thin_ticks(chart.x_ticks, labelled, gap) if chart.x_ticks else round_ticks(first, last, 5)
    axes.set_xticks(ticks, [chart.show_x(x) for x in ticks])
    axes.set_yticks(*zip(*_y_ticks(chart), strict=True))
    axes.set_xlabel(chart.x_label, fontsize=font, color=GREY)
    axes.set_ylabel(chart.y_label, fontsize=font, color=GREY)
    axes.tick_params(labelsize=0.95 * font, length=0.35 * font, color=GREY, labelcolor=GREY)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.09 * font)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)


def _train_lengths(chart: Chart) -> list[int]:
    return sorted({line.train_len_tokens for line in chart.lines if line.train_len_tokens is not None})


def _write_title(axes: Axes, chart: Chart, font: float, pad: float) -> None:
    axes.set_title(chart.title, loc="left", fontsize=1.2 * font, fontweight="bold", pad=pad)


def _style(line: Line) -> dict[str, Any]:
    colour = COLOURS[line.style % len(COLOURS)]
    if line.is_published:
        return {"color": colour, "marker": "x", "linestyle": ":"}
    dashes = DASHES[line.style % len(DASHES)] if line.name else "-"
    return {"color": colour, "marker": MARKERS[line.style % len(MARKERS)], "linestyle": dashes}


def _y_ticks(chart: Chart) -> list[tuple[float, str]]:
    """Return tick values and their texts, with as many decimals as distinguish them."""
    ticks = round_ticks(*chart.y_range, 7)
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if ticks[1:] else 1
    return [(value, f"{value:,.{decimals}f}") for value in ticks]


def _name_lines(axes: Axes, chart: Chart, font: float, axes_height: float) -> None:
    """Write names at line ends, where a line leaves the chart, and at the training lengths."""
    low, high = chart.y_range
    first, last = axes.get_xlim()
    for length in _train_lengths(chart):
        side = "left" if length - first < 0.2 * (last - first) else "center"
        transform, size = axes.get_xaxis_transform(), 0.9 * font
        axes.text(length, 1.02, "training length", transform=transform, ha=side, fontsize=size, color=GREY)
    ends = [(line, [point for point in line.points if not math.isnan(point[1])]) for line in chart.lines if line.name]
    staying = [(line, points[-1]) for line, points in ends if points and points[-1][1] <= high]
    gap = LINE_HEIGHT * font / axes_height
    heights = spread([(y - low) / (high - low) for _, (_, y) in staying], gap)
    too_low = max(0.0, -min(heights, default=0.0))
    names = [
        (line, line.name, x, height + too_low, (0.85 * font, 0.0), "center")
        for (line, (x, _)), height in zip(staying, heights, strict=True)
    ]
    leaving = [(_leaves_at(points, high), line) for line, points in ends if points and points[-1][1] > high]
    names += [
        (line, f"{line.name} \u2191", x, 1.0, (0.7 * font, -font * (0.3 + LINE_HEIGHT * row)), "top")
        for row, (x, line) in enumerate(sorted(leaving, key=lambda item: item[0]))
    ]
    for line, name, x, height, offset, align in names:
        axes.annotate(
            name,
            (x, height),
            xycoords=("data", "axes fraction"),
            xytext=offset,
            textcoords="offset points",
            annotation_clip=False,
            va=align,
            color=_style(line)["color"],
            fontsize=1.04 * font,
            fontweight="bold",
        )


def _save_png(figure: Figure, dpi: int) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _as_page_svg(chart: Chart, kind: str, summary: str) -> str:
    """Draw a chart as SVG without the parts of matplotlib's file that do not suit a page."""
    # The salt makes the ids of clip paths and markers unique in the page.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{kind} {summary}"}):
        margins = (*_margins(chart, PAGE_FONT), 3.7 * PAGE_FONT, 3.7 * PAGE_FONT)
        figure = _single(chart, PAGE_SIZES[kind], margins, PAGE_FONT)
        axes = figure.axes[0]
        axes.yaxis.label.set(rotation=0, ha="left", va="top")
        axes.yaxis.set_label_coords(0, 1, transform=figure.transFigure)
        FigureCanvasSVG(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    return _adapt(root, chart, kind, summary)


def _adapt(root: ElementTree.Element, chart: Chart, kind: str, summary: str) -> str:
    """Add a text alternative and titles of the points; use the page's font and colours."""
    for name in [name for name in root.attrib if name != "viewBox"]:
        del root.attrib[name]
    root.attrib |= {"class": f"chart {kind}", "role": "img", "aria-label": summary}
    for child in list(root):
        if child.tag == f"{{{_SVG}}}metadata" or child.find(f"{{{_SVG}}}style") is not None:
            root.remove(child)
    low, high = chart.y_range
    for group in root.iter(f"{{{_SVG}}}g"):
        kind_of_group, _, number = group.attrib.pop("id", "").partition(":")
        if kind_of_group == "dots":
            line = chart.lines[int(number)]
            shown = [(x, y) for x, y in line.points if low <= y <= high]
            for dot, (x, y) in zip(list(group.iter(f"{{{_SVG}}}use")), shown, strict=True):
                ElementTree.SubElement(dot, f"{{{_SVG}}}title").text = f"{line.name}: {y:,.2f} at {chart.show_x(x)}"
    for text in root.iter(f"{{{_SVG}}}text"):
        text.set("style", re.sub("font-family:[^;]*;", "", text.get("style", "")))
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    html = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in PAGE_COLOURS.items():
        html = html.replace(colour, variable)
    return html + "\n"
