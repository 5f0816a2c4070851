"""Draw training and validation curves of runs as PDF, SVG or PNG, while they train or afterwards.

Runs that differ only in train.seed become one curve with a band. The colour is that of the encoding where encodings
differ.

Example: python tools/plot.py runs/bipe_rope runs/rope --output loss.pdf --x tokens
"""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import add_title_options, check_output_file, command, picture_settings
from megatron_bipe.errors import ConfigError
from megatron_bipe.io import write_atomically
from megatron_bipe.picture import picture_format, save_figure

if TYPE_CHECKING:
    from megatron_bipe.eval.chart import Chart, Line
    from megatron_bipe.monitor.curves import XAxis
    from megatron_bipe.monitor.history import RunHistory

Y_LABELS = {"nats": "loss, nats per token", "bits_per_byte": "bits per byte", "optim/lr": "learning rate"}
X_LABELS: Mapping[str, str] = {"step": "step", "tokens": "training tokens", "hours": "hours of training steps"}
UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "K": 1e3}
BEGINNING = 0.05  # share of the horizontal axis whose values do not determine the vertical one
_log = logging.getLogger(__name__)


@command
def main(argv: Sequence[str] | None) -> None:
    given = _parser().parse_args(argv)
    kind, picture = picture_format(given.output), picture_settings(given)
    check_output_file(given.output, given.overwrite)
    if given.smooth is not None and given.smooth < 1:
        raise ConfigError(f"--smooth is {given.smooth}", remedy="Give 1 or more steps", location="--smooth")
    from megatron_bipe.eval.chart import draw_chart, draw_panels
    from megatron_bipe.monitor.curves import group_seeds, read_runs, select_keys

    histories = read_runs(given.run_dirs)
    keys = select_keys(histories, [key.strip() for key in given.keys.split(",")] if given.keys else [])
    groups = group_seeds(histories)
    charts = [_chart(groups, panel, given) for panel in _by_quantity(keys).values()]
    pairs = [charts[first : first + 2] for first in range(0, len(charts), 2)]
    figure = draw_chart(charts[0], picture) if len(charts) == 1 else draw_panels(pairs, picture)
    write_atomically(given.output, save_figure(figure, kind))
    print(f"Written: {given.output}")


def _by_quantity(keys: Sequence[str]) -> dict[str, list[str]]:
    """Return the keys by quantity, each of which has its panel: all losses in nats share one."""
    panels: dict[str, list[str]] = {}
    for key in keys:
        last = key.rpartition("/")[2]
        quantity = next((name for name in ("nats", "perplexity", "bits_per_byte") if last.endswith(name)), key)
        panels.setdefault(quantity, []).append(key)
    return panels


def _chart(groups: Sequence[Sequence["RunHistory"]], keys: Sequence[str], given: argparse.Namespace) -> "Chart":
    """Return the chart of keys with one quantity; training is in the background of validations."""
    from megatron_bipe.eval.chart import Chart
    from megatron_bipe.monitor.curves import group_names, smooth_steps

    lines = []
    names = group_names(groups)
    sizes = {len(group) for group in groups}
    for style, (name, group) in enumerate(zip(names, groups, strict=True)):
        seeds = f" ({len(group)} seeds)" if len(group) > 1 and len(sizes) > 1 else ""
        lines += _lines(f"{name}{seeds}", group, keys, style, given)
    if not lines:
        raise ConfigError(f"no run has values of {', '.join(keys)}", remedy="Choose others", location="--keys")
    quantity, *_ = _by_quantity(keys)
    widths = sorted({smooth_steps(group, given.smooth) for group in groups})
    mean = f"mean over {' to '.join(map(str, dict.fromkeys([widths[0], widths[-1]])))} steps"
    has_training = any(key in groups[0][0].columns_N for key in keys) and widths[-1] > 1
    kind = "Thin lines: training" if any(not line.name for line in lines) else "Training"
    low, high = _range(lines, given.log)
    notes = [f"{kind}, {mean}."] if has_training else []
    notes += ["The first steps lie above the chart."] * any(y > high for line in lines for _, y in line.points)
    label = Y_LABELS.get(quantity, quantity) + (", log scale" if given.log else "")
    return Chart(
        lines,
        X_LABELS[given.x],
        label,
        (low, high),
        note=" ".join(notes),
        show_x=_number(given.x),
        band_label=f"range of {max(sizes)} seeds" if len(sizes) == 1 else "range of seeds",
        is_log=given.log,
    )


def _lines(
    name: str, group: Sequence["RunHistory"], keys: Sequence[str], style: int, given: argparse.Namespace
) -> list["Line"]:
    """Return the lines of a group of runs; those of training have no name where there are validations."""
    from megatron_bipe.eval.chart import Line
    from megatron_bipe.monitor.curves import draw_curve, is_validation

    valid = [key for key in keys if all(is_validation(history, key) for history in group)]
    named = valid or keys
    lines = []
    for key in keys:
        curve = draw_curve(group, key, given.x, given.smooth)
        if curve is None:
            _log.warning("%s has no values of %s; it is drawn without them", name, key)
            continue
        long = f"{name}, {_short(key)}" if len(named) > 1 else name
        encoding = group[0].config.model.encoding
        lines.append(Line(long if key in named else "", curve.points, style, None, curve.band, encoding=encoding))
    return lines


def _short(key: str) -> str:
    """Return the part of a key that distinguishes it from others of its quantity."""
    first, _, rest = key.partition("/")
    return rest.rpartition("/")[0] if first == "valid" and "/" in rest else key


def _range(lines: Sequence["Line"], is_log: bool) -> tuple[float, float]:
    """Return limits that the values after the beginning fill; with a logarithmic axis, all positive values."""
    xs = [x for line in lines for x, _ in line.points]
    begin = min(xs) if is_log else min(xs) + BEGINNING * (max(xs) - min(xs))
    values = [y for line in lines for x, y in line.points if x >= begin and math.isfinite(y)]
    values += [y for line in lines for x, *bounds in line.band if x >= begin for y in bounds if math.isfinite(y)]
    if is_log:
        values = [value for value in values if value > 0]
    if not values:
        what = "there are no finite values" + (" above zero" if is_log else "")
        raise ConfigError(what, remedy="Choose other --keys" + (", or no --log" if is_log else ""), location="--keys")
    low, high = min(values), max(values)
    if is_log:
        return low / 1.1, high * 1.1
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _number(x: "XAxis") -> Callable[[float], str]:
    return {"step": "{:,.0f}".format, "tokens": _with_unit, "hours": "{:,.4g}".format}[x]


def _with_unit(tokens: float) -> str:
    unit, size = next(((unit, size) for unit, size in UNITS.items() if tokens >= size), ("", 1.0))
    return f"{tokens / size:g}{unit}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="folders of runs")
    add("--output", type=Path, required=True, metavar="FILE", help="picture to write: .pdf, .svg or .png")
    keys = "keys of metrics.jsonl or patterns, such as 'valid/*/nats' (default: losses of training and validation)"
    add("--keys", default="", metavar="KEY,...", help=keys)
    add("--x", choices=list(X_LABELS), default="step", help="horizontal axis (default: %(default)s)")
    smooth = "steps over which training values are averaged (default: 1/200 of the steps)"
    add("--smooth", type=int, metavar="N", help=smooth)
    add("--log", action="store_true", help="logarithmic vertical axis")
    add_title_options(parser)
    add("--overwrite", action="store_true", help="replace the file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
