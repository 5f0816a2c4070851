"""Plot of the extrapolation report, a column per subset: top by sequence length, bottom by position in the sequence."""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_bipe.eval.curves import COLOURS, Curve, thin_ticks, values_beyond, visible_range
from megatron_bipe.eval.extrapolation_results import Subset
from megatron_bipe.eval.plot import GREY, line_style


def draw_extrapolation(subsets: Sequence[Subset]) -> bytes:
    figure = Figure(figsize=(1.2 + 4.6 * len(subsets), 8.0), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(subsets), squeeze=False)
    for column, subset in enumerate(subsets):
        _draw_by_length(grid[0][column], subset)
        _draw_by_position(grid[1][column], subset)
    named = {label: handle for axes in grid[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_by_length(axes: Axes, subset: Subset) -> None:
    curves = []
    for index, line in enumerate(subset.lines):
        style = line_style(index)
        lengths = [losses.length_tokens for losses in line.losses]
        values = [losses.perplexity for losses in line.losses]
        curves.append(Curve(line.model, line.train_len_tokens, list(zip(lengths, values, strict=True))))
        axes.plot(lengths, values, linewidth=2, label=line.model, **style)
        bounds = [losses.interval() for losses in line.losses]
        if all(bounds):
            lows, highs = zip(*(pair for pair in bounds if pair), strict=True)
            axes.fill_between(lengths, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
        axes.axvline(line.train_len_tokens, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    known = {line.encoding: index for index, line in reversed(list(enumerate(subset.lines)))}
    for curve in subset.paper:
        if curve.encoding in known:
            colour = COLOURS[known[curve.encoding] % len(COLOURS)]
            lengths, values = [list(part) for part in zip(*curve.points, strict=True)]
            label = f"{curve.name}, the paper's"
            axes.plot(lengths, values, color=colour, label=label, linestyle=":", marker="x", linewidth=1.2)
            curves.append(Curve(label, curve.points[0][0], curve.points))
    _style_axes(axes, curves, f"{subset.name}: by sequence length", "sequence length, tokens")


def _draw_by_position(axes: Axes, subset: Subset) -> None:
    curves = []
    for index, line in enumerate(subset.lines):
        points = line.losses[-1].by_place
        curves.append(Curve(line.model, line.train_len_tokens, points))
        positions, values = zip(*points, strict=True)
        axes.plot(positions, values, color=COLOURS[index % len(COLOURS)], marker=".", linewidth=1.5)
        axes.axvline(line.train_len_tokens, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    longest = subset.lines[0].losses[-1].length_tokens
    _style_axes(axes, curves, f"{subset.name}: in sequences of {longest:,}", "position in the sequence, tokens")


def _style_axes(axes: Axes, curves: Sequence[Curve], title: str, label: str) -> None:
    low, high = visible_range(curves)
    axes.set_ylim(low, high)
    if beyond := values_beyond(curves, high):
        axes.text(0, 1.0, f"beyond: {beyond}", transform=axes.transAxes, fontsize=7, color=GREY, va="top", wrap=True)
    lengths = sorted({round(length) for curve in curves for length, _ in curve.points})
    axes.set_xticks(thin_ticks(lengths, [], 0.12 * (lengths[-1] - lengths[0])))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("perplexity (lower is better)", fontsize=9)
    axes.tick_params(labelsize=8.5, length=3)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
