"""Content of charts: lines with bands, the style of each line, and the limits and ticks of axes.

A line's colour is that of its encoding in every figure: bilevel encodings are solid with filled markers, and the flat
encoding that such a one is built on has the same colour, dashes and hollow markers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

from megatron_bipe.picture import COLOURS, DASHES, Measure

MARKERS = ("o", "s", "^", "D", "v", "P", ">")
_SOLID, _DASHED, _DOTTED = 0, 1, 2
_BILEVEL = "bipe_"
# Indices into COLOURS of the flat encodings.
_FAMILY_COLOURS: Mapping[str, int] = {
    "rope": 0,
    "alibi": 1,
    "xpos": 2,
    "t5": 3,
    "sinusoidal": 4,
    "learned": 4,
    "randomized_rope": 5,
    "nope": 6,
}
_PANELS = {"randomized_rope": "rope", "learned": "sinusoidal"}  # flat encodings shown with another one
LOG_RATIO = 4.0  # from this ratio of the limits on, the axis of perplexities is logarithmic


class _Scale(NamedTuple):
    label: str
    remark: str
    clip_factor: float
    """Upper limit of a chart, in multiples of the worst value at the training length."""


SCALES: Mapping[Measure, _Scale] = {
    "perplexity": _Scale("perplexity", " (lower is better)", 2.5),
    "nats": _Scale("loss, nats per token", "", 1.35),  # the same range at perplexities near 15
    "bits-per-byte": _Scale("bits per byte", " (lower is better)", 1.35),
}


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    """Label at the line's end; empty for a background line, which is thin and has no label or markers."""
    points: Sequence[tuple[float, float]]
    """(x, y), x ascending. NaN leaves a gap; infinite values leave the chart."""
    style: int = 0
    """Index of its colour, dashes and marker; the palette repeats. `encoding` has priority."""
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
    is_log: bool = False
    """True if the vertical axis is logarithmic; `y_label` must say so."""

    def height(self, y: float) -> float:
        """Return where a value is drawn: 0 at the bottom of the axes, 1 at the top."""
        low, high = self.y_range
        if self.is_log:
            return math.log(max(y, 1e-300) / low) / math.log(high / low)
        return (y - low) / (high - low)


class Style(NamedTuple):
    """Indices into COLOURS, DASHES and MARKERS."""

    colour: int
    dashes: int
    marker: int
    is_hollow: bool = False


def line_styles(lines: Sequence[Line]) -> list[Style]:
    """Return the style of each line of a figure.

    Encodings determine the styles if all models have one, unless there are several models and all have the same one, or
    two models would have the same colour and dashes. A background line has the style of its model: the named line with
    the same `style` and encoding.
    """
    models = [line for line in lines if line.name and not line.is_published]
    encodings = {line.encoding for line in models}
    styles = list[Style]()
    if all(map(_is_known, encodings)) and not len(encodings) == 1 < len(models):
        repeats = [sum(other.encoding == line.encoding for other in models[:at]) for at, line in enumerate(models)]
        bases = [_encoding_style(line.encoding) for line in models]
        styles = [_varied(base, repeat) if repeat else base for base, repeat in zip(bases, repeats, strict=True)]
    if len({(style.colour, style.dashes) for style in styles}) < len(models):
        are_distinct = len({line.style for line in models}) == len(models)
        styles = [_numbered_style(line.style if are_distinct else at) for at, line in enumerate(models)]
    by_model = {(line.style, line.encoding): style for line, style in zip(models, styles, strict=True)}
    in_order = iter(styles)
    return [
        next(in_order)
        if line.name and not line.is_published
        else by_model.get((line.style, line.encoding), _alone(line))
        for line in lines
    ]


def panel_name(encoding: str) -> str:
    """Return the small multiple that shows an encoding: the name of the flat encoding that it is built on."""
    flat = encoding.removeprefix(_BILEVEL)
    return _PANELS.get(flat, flat)


def _alone(line: Line) -> Style:
    return _encoding_style(line.encoding) if _is_known(line.encoding) else _numbered_style(line.style)


def _is_known(encoding: str) -> bool:
    return encoding.removeprefix(_BILEVEL) in _FAMILY_COLOURS


def _encoding_style(encoding: str) -> Style:
    flat = encoding.removeprefix(_BILEVEL)
    colour = _FAMILY_COLOURS[flat]
    if flat != encoding:
        return Style(colour, _SOLID, colour)
    return Style(colour, _DOTTED if flat in _PANELS else _DASHED, colour, is_hollow=True)


def _numbered_style(number: int) -> Style:
    return Style(number % len(COLOURS), number % len(DASHES), number % len(MARKERS))


def _varied(base: Style, repeat: int) -> Style:
    """Return a style of the same colour for another line of an encoding."""
    others = [index for index in range(len(DASHES)) if index not in (base.dashes, _SOLID, _DASHED)]
    return base._replace(dashes=others[(repeat - 1) % len(others)], marker=(base.marker + repeat) % len(MARKERS))


def perplexity_chart(
    lines: Sequence[Line],
    title: str = "",
    x_label: str = "sequence length, tokens",
    measure: Measure = "perplexity",
    band_label: str = "",
) -> Chart:
    """Return a chart of perplexities, or losses, that a diverging line does not stretch."""
    low, high = visible_range(lines, measure)
    least = min((y for line in lines for _, y in line.points if math.isfinite(y)), default=0.0)
    is_log = least > 0 and high > LOG_RATIO * least
    lengths = sorted({round(x) for line in lines for x, _ in line.points})
    beyond = values_beyond(lines, high)
    return Chart(
        lines,
        x_label,
        SCALES[measure].label + (", log scale" if is_log else SCALES[measure].remark),
        (least / 1.15, high) if is_log else (low, high),
        lengths,
        title,
        f"Beyond the chart: {beyond}" if beyond else "",
        band_label=band_label,
        is_log=is_log,
    )


def visible_range(lines: Sequence[Line], measure: Measure = "perplexity") -> tuple[float, float]:
    """Return limits of the vertical axis: all values and bands, unless a line far exceeds the others."""
    factor = SCALES[measure].clip_factor
    at_training = [
        min(line.points, key=lambda point: abs(point[0] - (line.train_len_tokens or 0)))[1] for line in lines
    ]
    values = [value for line in lines for _, value in line.points if not math.isnan(value)]
    edges = [edge for line in lines for _, *bounds in line.band for edge in bounds if math.isfinite(edge)]
    low = min(values, default=math.inf)
    if math.isinf(low):  # every model diverged
        return 0.0, 1.0
    sensible = factor * max((value for value in at_training if math.isfinite(value)), default=low)
    highest = max(*values, *edges, low)
    top = min(highest, sensible)
    low = min(low, *edges, low)
    room = max(top - low, 0.2 * (factor - 1) * low)  # noise must not look like an effect
    return max(0.0, low - 0.12 * room), top if top < highest else low + 1.08 * room


def values_beyond(lines: Sequence[Line], high: float) -> str:
    """Describe the values that the chart cannot show; empty if there are none."""
    parts = []
    for line in lines:
        gone = [f"{_rounded(value)} at {length:,.0f}" for length, value in line.points if value > high]
        if gone:
            parts.append(f"{line.name} {', '.join(gone)}")
    return "; ".join(parts)


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if 10 <= value < 1e6 else f"{value:.3g}" if value < float("inf") else "infinite"


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


def log_ticks(low: float, high: float, at_most: int) -> list[float]:
    """Return at most `at_most` round numbers inside [low, high], at nearly equal distances on a logarithmic axis."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= at_most:
            return ticks
    return ticks[:: -(-len(ticks) // at_most)]


def y_ticks(chart: Chart) -> list[tuple[float, str]]:
    """Return tick values and their texts, with as many decimals as distinguish them."""
    if chart.is_log:
        return [(value, f"{value:,.6g}") for value in log_ticks(*chart.y_range, 8)]
    ticks = round_ticks(*chart.y_range, 7)
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if ticks[1:] else 1
    return [(value, f"{value:,.{decimals}f}") for value in ticks]
