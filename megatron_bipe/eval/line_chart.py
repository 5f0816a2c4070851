"""Line charts as inline SVG; they use the page's colours and follow its light or dark scheme.

Torch-free and matplotlib-free. Lines differ in colour, dashes and marker, and are labelled at their ends. Each chart is
drawn twice, for wide pages and for phones, so that its text matches the page's size on both; the style sheet
(`page.css`) shows one of them.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from megatron_bipe.eval.curves import COLOURS, leaves_at, spread, thin_ticks

DASHES = ("", "9 4", "2.5 4", "12 4 2.5 4")
MARKERS = ("circle", "square", "triangle", "diamond")
NUM_STYLES = len(COLOURS)
TICK_GAP, LABEL_GAP, LABEL_CHARACTER = 46, 17, 7.6  # pixels: x tick distance, name distance, letter width of a name
TICK_CHARACTER = 7.6  # pixels: digit width on an axis
MARKER_GAP = 22  # pixels; lines with closer points have no markers


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    """Label at the line's end; empty for a background line, which is thin and has no label or markers."""
    style: int
    """Index of its colour, dashes and marker; the palette repeats."""
    points: Sequence[tuple[float, float]]
    """(x, y), x ascending. NaN leaves a gap; infinite values leave the chart."""


class Chart(NamedTuple):
    """Content of a chart."""

    summary: str
    """Text alternative for screen readers."""
    x_label: str
    y_label: str
    lines: Sequence[Line]
    y_range: tuple[float, float]
    """Limits of the vertical axis; lines are clipped there."""
    x_ticks: Sequence[float] = ()
    """Values to label, thinned if they do not fit; empty: round numbers."""
    x_mark: tuple[float, str] | None = None
    """A vertical line at this x, and its label."""
    show_x: Callable[[float], str] = "{:,.0f}".format


class _Frame(NamedTuple):
    """The plotting area in pixels and the values at its edges."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.top + self.height * (1 - (value - low) / (high - low))


def line_chart(chart: Chart) -> str:
    """Return the chart as two `<svg>` elements, classes `wide` and `narrow`."""
    return _draw(chart, "wide", 840, 400) + _draw(chart, "narrow", 358, 330)


def nice_ticks(low: float, high: float, at_most: int) -> list[float]:
    """Return at most `at_most` multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    rough = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * power) <= at_most - 1)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _draw(chart: Chart, kind: str, width: int, height: int) -> str:
    named = [line for line in chart.lines if line.name]
    right = 22 + LABEL_CHARACTER * max((len(line.name) for line in named), default=0)
    xs = [x for line in chart.lines for x, _ in line.points] + ([chart.x_mark[0]] if chart.x_mark else [])
    low, high = min(xs), max(xs)
    margin = 0.02 * (high - low) or 1.0
    top = 52 if chart.x_mark else 32
    numbers = _y_numbers(chart.y_range)
    left = 14 + TICK_CHARACTER * max((len(shown) for _, shown in numbers), default=0)
    frame = _Frame(left, top, width - left - right, height - top - 52, (low - margin, high + margin), chart.y_range)
    parts = [*_axes(chart, frame, numbers, height), *_mark(chart, frame), *_curves(chart, frame), *_names(named, frame)]
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.summary)}">'
        + "".join(parts)
        + "</svg>\n"
    )


def _y_numbers(y_range: tuple[float, float]) -> list[tuple[float, str]]:
    """Return tick values and their texts, with as many decimals as distinguish them."""
    ticks = nice_ticks(*y_range, at_most=7)
    decimals = max(0, -math.floor(math.log10(min(b - a for a, b in pairwise(ticks))) + 1e-9)) if ticks[1:] else 1
    return [(value, f"{value:,.{decimals}f}") for value in ticks]


def _axes(chart: Chart, frame: _Frame, numbers: list[tuple[float, str]], height: int) -> list[str]:
    """Return grid lines with numbers, ticks, and the labels of both axes."""
    bottom, right = frame.top + frame.height, frame.left + frame.width
    parts = []
    for value, shown in numbers:
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{frame.left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(frame.left - 8, y + 4, shown, "tick", "end"))
    always = [chart.x_mark[0]] if chart.x_mark and chart.x_ticks else []
    gap = TICK_GAP * (frame.x_range[1] - frame.x_range[0]) / frame.width
    num_ticks = max(3, min(7, int(frame.width / (1.6 * TICK_GAP))))
    for value in thin_ticks(chart.x_ticks, always, gap) if chart.x_ticks else nice_ticks(*frame.x_range, num_ticks):
        x = frame.x(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{bottom + 5:.1f}"/>')
        parts.append(_text(x, bottom + 20, chart.show_x(value), "tick", "middle"))
    parts.append(f'<line class="axis" x1="{frame.left:.1f}" x2="{right:.1f}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>')
    parts.append(_text(frame.left + frame.width / 2, height - 8, chart.x_label, "label", "middle"))
    parts.append(_text(0, 14, chart.y_label, "label", "start"))
    return parts


def _mark(chart: Chart, frame: _Frame) -> list[str]:
    if chart.x_mark is None:
        return []
    value, label = chart.x_mark
    x, bottom = frame.x(value), frame.top + frame.height
    nearer_left = x - frame.left < frame.width / 2
    return [
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top - 6:.1f}" y2="{bottom:.1f}"/>',
        _text(x - 4 if nearer_left else x + 4, frame.top - 12, label, "tick", "start" if nearer_left else "end"),
    ]


def _curves(chart: Chart, frame: _Frame) -> list[str]:
    """Return all lines; a nested svg clips them to the frame."""
    inner = frame._replace(left=0, top=0)
    low, high = frame.y_range
    body, dots = [], []
    for line in sorted(chart.lines, key=lambda line: bool(line.name)):  # background lines first
        style = f"s{line.style % NUM_STYLES}"
        for part in _split_at_nan(line.points):
            # An infinite value is drawn far beyond the frame, to show the line leaving it.
            positions = [(inner.x(x), inner.y(min(y, high + 20 * (high - low)))) for x, y in part]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
            kind = "line" if line.name else "line behind"
            body.append(f'<polyline class="{kind} {style}"{_dashes(line)} points="{path}"/>')
        crowded = frame.width < MARKER_GAP * (len(line.points) - 1)
        for x, y in line.points if line.name and not crowded else ():
            if low <= y <= high:
                said = f"{line.name}: {y:,.2f} at {chart.show_x(x)}"
                shape = _shape(MARKERS[line.style % len(MARKERS)], frame.x(x), frame.y(y))
                dots.append(f'<g class="dot {style}"><title>{escape(said)}</title>{shape}</g>')
    area = f'<svg x="{frame.left:.1f}" y="{frame.top}" width="{frame.width:.1f}" height="{frame.height:.1f}">'
    return [area, *body, "</svg>", *dots]


def _names(lines: Sequence[Line], frame: _Frame) -> list[str]:
    """Return labels at line ends; a line that leaves the chart is labelled where it leaves."""
    high = frame.y_range[1]
    ends = [(line, [point for point in line.points if not math.isnan(point[1])]) for line in lines]
    staying = [(line, points[-1]) for line, points in ends if points and points[-1][1] <= high]
    heights = spread([frame.y(y) for _, (_, y) in staying], LABEL_GAP)
    too_low = max(0.0, max(heights, default=0.0) - frame.top - frame.height)
    parts = [
        _text(frame.x(x) + 11, height - too_low + 4, line.name, f"name s{line.style % NUM_STYLES}")
        for (line, (x, _)), height in zip(staying, heights, strict=True)
    ]
    leaving = [(leaves_at(points, high), line) for line, points in ends if points and points[-1][1] > high]
    for row, (x, line) in enumerate(sorted(leaving, key=lambda item: item[0])):
        position = min(frame.x(x) + 8, frame.left + frame.width + 6)
        parts.append(
            _text(position, frame.top + 13 + LABEL_GAP * row, f"{line.name} ↑", f"name s{line.style % NUM_STYLES}")
        )
    return parts


def _split_at_nan(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Split a line at NaN values."""
    parts: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isnan(point[1]):
            parts.append([])
        else:
            parts[-1].append(point)
    return [part for part in parts if part]


def _dashes(line: Line) -> str:
    dashes = DASHES[line.style % len(DASHES)] if line.name else ""
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _shape(kind: str, x: float, y: float) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    if kind == "square":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    corners = {"triangle": ((0, -5.2), (5, 4), (-5, 4)), "diamond": ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0))}[kind]
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
