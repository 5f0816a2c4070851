"""Figures of charts: for papers as PNG, PDF and SVG, and inside pages as SVG that uses the page's colours.

Figures have the width of a paper's column or page, where their text is readable at its size. An SVG inside a page is
drawn with one point per CSS pixel, once for wide pages and once for phones, and the style sheet (`page.css`) shows one
of them.
"""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_bipe.eval.chart_axes import (
    CHARACTER,
    LINE_HEIGHT,
    PAPER,
    band_entry,
    draw_lines,
    drawable,
    legend_entries,
    name_lines,
    train_length_entry,
    train_lengths,
    write_title,
)
from megatron_bipe.eval.chart_content import (
    Chart,
    Line,
    line_styles,
    panel_name,
    perplexity_chart,
    y_ticks,
)
from megatron_bipe.picture import (
    COLOURS,
    DEFAULT_PICTURE,
    GREY,
    GRID,
    WIDTHS_IN,
    PictureSettings,
    Width,
    drawing,
    printable,
)

__all__ = ["Chart", "Line", "draw_chart", "draw_panels", "draw_svg", "line_styles", "perplexity_chart"]
MOST_LINES = 8  # in one panel
FONT, COLUMN_FONT = 8.5, 7.0
NOTE = 0.85  # size of notes, in multiples of the font size
NAMES_SHARE = 0.27  # of the width that names at line ends may take
LEGEND: dict[str, Any] = {"handlelength": 2.6, "handletextpad": 0.5, "columnspacing": 1.4}
BEHIND = "#d4d4d4"
PAGE_COLOURS = {colour: f"var(--line{number})" for number, colour in enumerate(COLOURS)} | {
    GREY: "var(--soft)",
    GRID: "var(--faint)",
    BEHIND: "var(--rule)",
    PAPER: "var(--page)",
}
PAGE_FONT = 13.0
PAGE_SIZES = {"wide": (840.0, 400.0), "narrow": (358.0, 330.0)}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


class Margins(NamedTuple):
    """Room around the axes, in points."""

    left: float
    right: float
    top: float
    bottom: float


def draw_chart(chart: Chart, settings: PictureSettings = DEFAULT_PICTURE) -> Figure:
    """Return one chart with names at the line ends, or in a legend if they do not fit; many lines become panels."""
    chart = chart._replace(title=settings.title or chart.title)
    is_column, width = settings.width == "column", 72 * WIDTHS_IN[settings.width]
    if panels := _by_family(chart):
        return _small_multiples(chart, panels, settings)
    font = COLUMN_FONT if is_column else FONT
    names = max((len(line.name) for line in chart.lines), default=0) * CHARACTER * font
    has_names = names < NAMES_SHARE * width and _end_together(chart)
    with drawing():
        figure, axes = _figure(settings, 1, 1, 180 if is_column else 245)
        draw_lines(axes[0], chart, font, 0.85 * width - names * has_names)
        if has_names:
            name_lines(axes[0], chart, font, 120 if is_column else 180)
        if chart.title:
            write_title(axes[0], chart, font, width, pad=(1.8 if has_names and train_lengths(chart) else 0.7) * font)
        named = {} if has_names else legend_entries(chart) | train_length_entry(chart)
        _write_legend(figure, named | band_entry(chart), font, chart.note)
    return figure


def draw_panels(rows: Sequence[Sequence[Chart]], settings: PictureSettings = DEFAULT_PICTURE) -> Figure:
    """Return charts in rows and columns, or below each other in a paper's column, with one legend for all."""
    charts = [chart for row in rows for chart in row]
    columns = 1 if settings.width == "column" else len(rows[0])
    font, width = COLUMN_FONT, 72 * WIDTHS_IN[settings.width] / columns
    entries: dict[str, Artist] = {}
    with drawing():
        figure, panels = _figure(settings, -(-len(charts) // columns), columns, 170)
        for axes in panels[len(charts) :]:
            axes.remove()
        for axes, chart in zip(panels, charts, strict=False):
            draw_lines(axes, chart, font, 0.85 * width)
            note = textwrap.wrap(printable(chart.note), width=int(0.88 * width / (0.56 * NOTE * font)))
            if chart.title or note:
                write_title(axes, chart, font, width, pad=font * (0.6 + NOTE * LINE_HEIGHT * len(note)))
            text = axes.text(0, 1.01, "\n".join(note), transform=axes.transAxes, fontsize=NOTE * font, color=GREY)
            text.set_in_layout(False)  # it would narrow the axes; the title's distance makes the room
            entries |= legend_entries(chart)
        for chart in charts:
            entries |= train_length_entry(chart) | band_entry(chart)
        if settings.title:
            figure.suptitle(settings.title, x=0.01, ha="left", fontsize=1.3 * font, fontweight="bold")
        _write_legend(figure, entries, font)
    return figure


def draw_svg(chart: Chart, summary: str) -> str:
    """Return two `<svg>` elements, classes `wide` and `narrow`; many lines become panels, as in `draw_chart`.

    `summary` is their text for screen readers.
    """
    with drawing():
        return "".join(_as_page_svg(chart, kind, summary) for kind in PAGE_SIZES)


def _end_together(chart: Chart) -> bool:
    """Return True if all lines that stay in the chart end near its right side, where their names are."""
    xs = [x for line in chart.lines for x, _ in line.points]
    ends = [
        [x for x, y in line.points if not math.isnan(y)][-1:]
        for line in chart.lines
        if line.name and line.points and not line.points[-1][1] > chart.y_range[1]
    ]
    return all(end and max(xs) - end[0] <= 0.15 * (max(xs) - min(xs)) for end in ends)


def _by_family(chart: Chart) -> dict[str, list[Line]]:
    """Return the named lines by panel; empty if one chart shows them all: few lines, or a line without encoding."""
    families: dict[str, list[Line]] = {}
    for line in chart.lines:
        if line.name:
            families.setdefault(panel_name(line.encoding), []).append(line)
    num_lines = sum(map(len, families.values()))
    return families if num_lines > MOST_LINES and len(families) > 1 and "" not in families else {}


def _small_multiples(chart: Chart, panels: Mapping[str, Sequence[Line]], settings: PictureSettings) -> Figure:
    """Draw a panel for each family of encodings, with all other lines in grey behind it."""
    columns = min(2 if settings.width == "column" else 3, len(panels))
    font, width = COLUMN_FONT, 72 * WIDTHS_IN[settings.width] / columns
    with drawing():
        more_names = max(0, max(map(len, panels.values())) - 3)
        rows = -(-len(panels) // columns)
        around = 110 / rows  # title, legend and label of the x axis, which all rows share
        figure, found = _figure(settings, rows, columns, 110 + around + 1.7 * font * more_names)
        for number, (axes, lines) in enumerate(zip(found, panels.values(), strict=False)):
            for other in chart.lines:
                axes.plot(*zip(*drawable(chart, other), strict=True), color=BEHIND, linewidth=0.7, zorder=0)
            is_lowest = number + columns >= len(panels)
            shown = chart._replace(lines=lines, x_label=chart.x_label if is_lowest else "", y_label="")
            draw_lines(axes, shown, font, 0.8 * width)
            axes.tick_params(labelleft=number % columns == 0)
            _write_panel_names(axes, legend_entries(shown), font, width)
        for axes in found[len(panels) :]:
            axes.remove()
        figure.supylabel(chart.y_label, fontsize=font, color=GREY)
        figure.suptitle(printable(chart.title), x=0.01, ha="left", fontsize=1.2 * font, fontweight="bold")
        others: dict[str, Artist] = {"the other lines": Line2D([], [], color=BEHIND, linewidth=1)}
        _write_legend(figure, others | train_length_entry(chart) | band_entry(chart), font, chart.note)
    return figure


def _write_panel_names(axes: Axes, entries: Mapping[str, Artist], font: float, width: float) -> None:
    """Write a legend of one panel above its axes, in place of a title."""
    needed = sum(font * (CHARACTER * len(name) + 4) for name in entries)
    columns = len(entries) if needed < 0.9 * width else 1
    corner: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.1}
    legend = axes.legend(entries.values(), entries, fontsize=font, frameon=False, ncols=columns, **LEGEND, **corner)
    legend.set_in_layout(False)  # a long name would narrow the axes; an empty title makes the room
    axes.set_title("\n" * (len(entries) // columns - 1) + " ", fontsize=1.1 * font)


def _figure(settings: PictureSettings, rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return an empty figure and its axes; `height` is that of one row, in points."""
    size = (WIDTHS_IN[settings.width], rows * height / 72)
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _write_legend(figure: Figure, entries: Mapping[str, Artist], font: float, note: str = "") -> None:
    """Write a legend below the axes, and the note above it; then fix the layout, which would vary by format."""
    width = 72 * figure.get_figwidth()
    if entries or note:
        longest = max(map(len, entries), default=0)
        columns = max(1, min(len(entries), int(width / (font * (CHARACTER * longest + 4)))))
        lines = "\n".join(textwrap.wrap(printable(note), width=int(width / (0.55 * NOTE * font)))) or None
        legend = figure.legend(
            entries.values(),
            entries,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=font,
            title=lines,
            title_fontsize=NOTE * font,
            **LEGEND,
        )
        legend.get_title().set_color(GREY)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _single(chart: Chart, size: tuple[float, float], margins: Margins, font: float) -> Figure:
    """Draw one chart with names at its line ends."""
    (width, height), (left, right, top, bottom) = size, margins
    figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
    axes_width, axes_height = width - left - right, height - top - bottom
    axes = figure.add_axes((left / width, bottom / height, axes_width / width, axes_height / height))
    draw_lines(axes, chart, font, axes_width)
    name_lines(axes, chart, font, axes_height)
    return figure


def _side_margins(chart: Chart, font: float) -> tuple[float, float]:
    """Return room for the numbers left of the axes, and for the names right of it."""
    numbers = max((len(text) for _, text in y_ticks(chart)), default=0)
    names = max((len(line.name) for line in chart.lines), default=0)
    return font * (1.1 + CHARACTER * numbers), font * (1.7 + 1.04 * CHARACTER * names)


def _as_page_svg(chart: Chart, kind: str, summary: str) -> str:
    """Draw a chart as SVG without the parts of matplotlib's file that do not suit a page."""
    panels = _by_family(chart)
    charts = [chart._replace(lines=lines) for lines in panels.values()] or [chart]
    # The salt makes the ids of clip paths and markers unique in the page.
    with mpl.rc_context({"svg.hashsalt": f"{kind} {summary}", "text.color": GREY}):
        figure = _page_panels(chart, panels, kind) if panels else _page_chart(chart, kind)
        FigureCanvasSVG(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    return _adapt(root, charts, kind, summary)


def _page_panels(chart: Chart, panels: Mapping[str, Sequence[Line]], kind: str) -> Figure:
    width: Width = "page" if kind == "wide" else "column"
    return _small_multiples(chart, panels, PictureSettings(width=width))


def _page_chart(chart: Chart, kind: str) -> Figure:
    margins = Margins(*_side_margins(chart, PAGE_FONT), 3.7 * PAGE_FONT, 3.7 * PAGE_FONT)
    figure = _single(chart, PAGE_SIZES[kind], margins, PAGE_FONT)
    axes = figure.axes[0]
    axes.yaxis.label.set(rotation=0, ha="left", va="top")
    axes.yaxis.set_label_coords(0, 1, transform=figure.transFigure)
    return figure


def _adapt(root: ElementTree.Element, charts: Sequence[Chart], kind: str, summary: str) -> str:
    """Add a text alternative and titles of the points; use the page's font and colours."""
    for name in [name for name in root.attrib if name != "viewBox"]:
        del root.attrib[name]
    root.attrib |= {"class": f"chart {kind}", "role": "img", "aria-label": summary}
    root.set("fill", PAGE_COLOURS["#000000"])  # matplotlib writes no fill for black
    for child in list(root):
        if child.tag == f"{{{_SVG}}}metadata" or child.find(f"{{{_SVG}}}style") is not None:
            root.remove(child)
    groups = [group for group in root.iter(f"{{{_SVG}}}g") if group.get("id", "").startswith("axes_")]
    for group, chart in zip(groups, charts, strict=True):
        _add_titles(group, chart)
    for group in root.iter(f"{{{_SVG}}}g"):
        group.attrib.pop("id", None)
    for text in root.iter(f"{{{_SVG}}}text"):
        text.set("style", re.sub("font-family:[^;]*;", "", text.get("style", "")))
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    html = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in PAGE_COLOURS.items():
        html = html.replace(colour, variable)
    return html + "\n"


def _add_titles(axes: ElementTree.Element, chart: Chart) -> None:
    """Add a title to each point of the axes that show a chart."""
    low, high = chart.y_range
    for group in axes.iter(f"{{{_SVG}}}g"):
        kind, _, number = group.get("id", "").partition(":")
        if kind == "dots":
            line = chart.lines[int(number)]
            shown = [(x, y) for x, y in line.points if low <= y <= high]
            for dot, (x, y) in zip(list(group.iter(f"{{{_SVG}}}use")), shown, strict=True):
                ElementTree.SubElement(dot, f"{{{_SVG}}}title").text = f"{line.name}: {y:,.2f} at {chart.show_x(x)}"
