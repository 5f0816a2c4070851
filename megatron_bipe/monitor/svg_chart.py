"""Line charts as inline SVG that follow the page's colours and width; no script, no image.

The drawing is stretched to the width of the page, so lines have a constant width (`non-scaling-stroke`), a dot is a
line of length 0 with round ends, and all text is HTML. A long series is reduced to the smallest and the largest value
of each column of the drawing, so a spike of one step stays visible.

N points · P points of the drawing
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from megatron_bipe.monitor.history import FloatArray

WIDTH, HEIGHT = 1000, 1000  # coordinates of the drawing
MAX_COLUMNS, MEAN_COLUMNS, MAX_DOTS = 700, 150, 60
NUM_STYLES = 7
_WARM_UP = 0.02  # fraction of a curve whose values do not extend a linear axis
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k"))


class Series(NamedTuple):
    """A curve."""

    name: str
    """Name in the legend; "": not listed there."""
    x_N: FloatArray
    y_N: FloatArray
    style: int = 0
    shape: str = "line"
    """CSS class: line, faint or dotted."""
    has_dots: bool = False


class Mark(NamedTuple):
    """A vertical line at an event."""

    x: float
    kind: str
    """Name in the legend: start, rollback, ..."""
    text: str


class Plot(NamedTuple):
    """Content of a chart."""

    series: Sequence[Series]
    x_label: str
    y_label: str
    marks: Sequence[Mark] = ()
    log_x: bool = False
    log_y: bool = False


def draw(plot: Plot) -> str:
    """Return a chart with its legend as HTML; "" if it has no finite point."""
    series = [_finite(each, plot) for each in plot.series]
    series = [each for each in series if each.x_N.size]
    if not series:
        return ""
    x_range = _padded(min(each.x_N.min() for each in series), max(each.x_N.max() for each in series), 0.0)
    y_range = _y_range(series, plot.log_y)
    to_x, to_y = _scale(x_range, plot.log_x, WIDTH), _scale(y_range, plot.log_y, HEIGHT)
    x_ticks = _ticks(x_range, plot.log_x, 5, [each.x_N for each in series])
    y_ticks = _ticks(y_range, plot.log_y, 6, ())
    paths = [f'<path class="grid" d="M0 {HEIGHT - to_y(y):.0f}H{WIDTH}"/>' for y in y_ticks]
    marks = [mark for mark in plot.marks if x_range[0] <= mark.x <= x_range[1]]
    paths += [
        f'<path class="mark {_class(mark.kind)}" d="M{to_x(mark.x):.1f} 0V{HEIGHT}"><title>{escape(mark.text)}</title>'
        "</path>"
        for mark in marks
    ]
    paths += [_path(each, to_x, to_y) for each in series]
    labels = [f'<span class="y" style="top:{100 - to_y(y) / HEIGHT * 100:.1f}%">{short(y)}</span>' for y in y_ticks]
    labels += [_x_label(short(x), to_x(x) / WIDTH * 100) for x in x_ticks]
    summary = f"{plot.y_label} against {plot.x_label}. {'; '.join(map(_described, series))}"
    return (
        f'<div class="plot">\n<p class="axis">{escape(plot.y_label)}</p>\n<div class="area" role="img" '
        f'aria-label="{escape(summary)}">\n<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" '
        f'aria-hidden="true">\n{"".join(paths)}\n</svg>\n{"".join(labels)}\n</div>\n'
        f'<p class="axis end">{escape(plot.x_label)}</p>\n{_legend(series, marks)}</div>\n'
    )


def noisy(name: str, x_N: FloatArray, y_N: FloatArray, style: int = 0) -> list[Series]:
    """Return a curve of every step as its range, drawn faint, and its mean."""
    mean_x_P, mean_y_P = mean_by_column(x_N, y_N)
    has_range = x_N.size > 2 * MEAN_COLUMNS
    return [*([Series("", x_N, y_N, style, "faint")] if has_range else []), Series(name, mean_x_P, mean_y_P, style)]


def mean_by_column(x_N: FloatArray, y_N: FloatArray, columns: int = MEAN_COLUMNS) -> tuple[FloatArray, FloatArray]:
    """Return the mean points of equal parts of a curve; the curve itself if it is short."""
    finite_N = np.isfinite(x_N) & np.isfinite(y_N)
    x_N, y_N = x_N[finite_N], y_N[finite_N]
    if x_N.size <= 2 * columns:
        return x_N, y_N
    starts = np.linspace(0, x_N.size, columns, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, x_N.size))
    return np.add.reduceat(x_N, starts) / counts, np.add.reduceat(y_N, starts) / counts


def extremes_by_column(x_N: FloatArray, y_N: FloatArray, columns: int = MAX_COLUMNS) -> tuple[FloatArray, FloatArray]:
    """Return the smallest and the largest value of each part of a curve; the curve itself if it is short."""
    if x_N.size <= 2 * columns:
        return x_N, y_N
    starts = np.linspace(0, x_N.size, columns, endpoint=False).astype(int)
    pairs = np.stack([np.minimum.reduceat(y_N, starts), np.maximum.reduceat(y_N, starts)], axis=1)
    return np.repeat(x_N[starts], 2), pairs.ravel()


def short(value: float) -> str:
    """Return a number for a tick or a tile: 2.5e-4, 0.25, 3,000, 25k, 1.5B, 3e18."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, suffix in _SUFFIXES:
        if size >= unit:
            return f"{value / (1e3 if suffix == 'k' else unit):.4g}{suffix}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _x_label(text: str, percent: float) -> str:
    """Return a tick label; one at the right end ends there, so that a narrow page does not become wider."""
    kind = "x last" if percent > 96 else "x"
    return f'<span class="{kind}" style="left:{percent:.1f}%">{text}</span>'


def _finite(series: Series, plot: Plot) -> Series:
    keep_N = np.isfinite(series.x_N) & np.isfinite(series.y_N)
    keep_N &= (series.x_N > 0) if plot.log_x else True
    keep_N &= (series.y_N > 0) if plot.log_y else True
    return series._replace(x_N=series.x_N[keep_N], y_N=series.y_N[keep_N])


def _y_range(series: Sequence[Series], is_log: bool) -> tuple[float, float]:
    low = min(float(each.y_N.min()) for each in series)
    tops = [each.y_N if is_log else each.y_N[int(_WARM_UP * each.y_N.size) :] for each in series]
    high = max(float(top.max()) for top in tops)
    if is_log:
        return (low / 1.1, high * 1.1)
    return _padded(low, high, 0.05)


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    room = high - low
    if room <= 0:
        room = abs(high) or 1.0
        return low - 0.1 * room, high + 0.1 * room
    return low - share * room, high + share * room


def _scale(limits: tuple[float, float], is_log: bool, size: int) -> Callable[[float], float]:
    """Return the function from values to coordinates."""
    low, high = map(math.log, limits) if is_log else limits
    return lambda value: ((math.log(value) if is_log else value) - low) / (high - low) * size


def _ticks(limits: tuple[float, float], is_log: bool, at_most: int, points: Sequence[FloatArray]) -> list[float]:
    if is_log and points:  # few x values, such as sequence lengths, are labelled themselves
        return sorted({float(x) for x_N in points for x in x_N})[-8:]
    values = MaxNLocator(at_most, steps=[1, 2, 5, 10]).tick_values(*limits)
    if is_log:
        for subs in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
            decades = LogLocator(subs=subs, numticks=9).tick_values(*limits)
            if sum(limits[0] <= value <= limits[1] for value in decades) >= 3:
                values = decades
                break
    return [round(float(value), 12) for value in values if limits[0] <= value <= limits[1]]


def _path(series: Series, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    x_P, y_P = extremes_by_column(series.x_N, series.y_N)
    points = [
        f"{to_x(x):.0f} {min(max(HEIGHT - to_y(y), -HEIGHT), 2 * HEIGHT):.0f}"
        for x, y in zip(x_P.tolist(), y_P.tolist(), strict=True)
    ]
    kind = f"{series.shape} s{series.style % NUM_STYLES}"
    line = f'<path class="{kind}" d="M{"L".join(points)}"/>'
    if (series.has_dots and len(points) <= MAX_DOTS) or len(points) == 1:
        line += f'<path class="dots s{series.style % NUM_STYLES}" d="{"".join(f"M{point}h0" for point in points)}"/>'
    return line


def _legend(series: Sequence[Series], marks: Iterable[Mark]) -> str:
    named = {each.name: f"{each.shape} s{each.style % NUM_STYLES}" for each in series if each.name}
    items = [f'<li class="{kind}"><i></i>{escape(name)}</li>' for name, kind in named.items()] if named else []
    items += [f'<li class="mark {_class(kind)}"><i></i>{escape(kind)}</li>' for kind in {m.kind: 0 for m in marks}]
    return f'<ul class="names">{"".join(items)}</ul>\n' if len(items) > 1 else ""


def _described(series: Series) -> str:
    name = f"{series.name}: " if series.name else ""
    return f"{name}{short(float(series.y_N[0]))} to {short(float(series.y_N[-1]))}"


def _class(kind: str) -> str:
    return kind.replace(" ", "-")
