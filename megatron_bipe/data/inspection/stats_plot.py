"""A plot of the distributions of `stats.py`, with one panel per quantity and one curve per dataset."""

import io
from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_bipe.data.inspection.stats import Distribution, Statistics
from megatron_bipe.data.inspection.stats_text import QUANTITIES

STYLES = ("-", "--", ":", "-.")  # distinguish curves of the same color, since there are ten colors
LEGEND_ROWS = 12
UNITS = {"Gi": 30, "Mi": 20, "Ki": 10}
GRID = "#e6e6e6"


def draw_stats(found: Mapping[str, Statistics]) -> bytes:
    """Return a PNG with the share of segments, sequences and documents in each power of two, by dataset name."""
    columns = -(-len(found) // LEGEND_ROWS) if len(found) > 1 else 0
    figure = Figure(figsize=(13.5 + 2.2 * columns, 4.2), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(QUANTITIES))
    for axes, (title, quantity) in zip(panels, QUANTITIES.items(), strict=True):
        _draw_panel(axes, title, found, quantity)
    if columns:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", ncols=columns, fontsize=8, frameon=False)
    else:
        figure.suptitle(next(iter(found), ""), x=0.01, ha="left", fontsize=11, fontweight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_panel(
    axes: Axes, title: str, found: Mapping[str, Statistics], quantity: Callable[[Statistics], Distribution]
) -> None:
    highest = 1
    for number, (name, statistics) in enumerate(found.items()):
        distribution = quantity(statistics)
        bins = distribution.bins()
        shares = [100 * count / max(distribution.count, 1) for count in bins.values()]
        edges = [*range(len(bins) + 1)]  # powers of two at equal distances: a logarithmic axis with a bin for 0
        highest = max(highest, len(bins))
        axes.stairs(
            shares,
            edges,
            label=name,
            color=f"C{number % 10}",
            linestyle=STYLES[number // 10 % len(STYLES)],
            linewidth=1.6,
        )
    lows = [0, *(1 << exponent for exponent in range(highest))]
    ticks = range(0, highest + 1, max(1, -(-highest // 8)))
    axes.set_xticks(list(ticks), [_short(lows[tick]) for tick in ticks])
    axes.set_xlabel(f"{title}, in powers of two", fontsize=9)
    axes.set_ylabel("share, %", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8.5, length=3)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _short(number: int) -> str:
    """Abbreviate a number: 1024 as 1Ki."""
    for unit, exponent in UNITS.items():
        if number >> exponent:
            return f"{number >> exponent}{unit}"
    return f"{number}"
