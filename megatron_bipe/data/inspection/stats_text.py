"""Statistics of datasets as text tables, as JSON for scripts, and as a plot."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_bipe.data.inspection.stats import SEQ_LEN_TOKENS, Distribution, Statistics
from megatron_bipe.data.manifest import Manifest, sum_if_known
from megatron_bipe.picture import (
    COLOURS,
    DASHES,
    DEFAULT_PICTURE,
    GREY,
    GRID,
    WIDTHS_IN,
    PictureSettings,
    drawing,
    printable,
)
from megatron_bipe.text_table import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTITIES: dict[str, Callable[[Statistics], Distribution]] = {
    "segment length, tokens": lambda statistics: statistics.segment_tokens,
    f"segments in {SEQ_LEN_TOKENS} tokens": lambda statistics: statistics.segments_per_sequence,
    "document length, tokens": lambda statistics: statistics.document_tokens,
}
_HEADINGS = ["shard", "documents", "tokens", "segments", "text bytes", "tokens/segment", "segments/1024 tokens"]
CLIP = SEQ_LEN_TOKENS - 1  # the paper's clip: the largest intra id


def stats_table(manifest: Manifest) -> str:
    """Describe a dataset, with counts and means per shard and in total."""
    rows = [_stats_row(s.name, s.documents, s.tokens, s.segments, s.text_bytes) for s in manifest.shards]
    head = [
        *_made_with(manifest),
        f"stored as  {manifest.dtype} and one bit per token, fingerprint {manifest.fingerprint[:16]}",
    ]
    return "\n".join([*head, "", text_table([_HEADINGS, *rows, _total_row([manifest])])])


def datasets_table(manifests: Mapping[str, Manifest]) -> str:
    """Describe several datasets, by name, with counts and means per dataset and in total."""
    head = dict.fromkeys(line for manifest in manifests.values() for line in _made_with(manifest))
    rows = [[name, *_total_row([manifest])[1:]] for name, manifest in manifests.items()]
    return "\n".join([*head, "", text_table([["dataset", *_HEADINGS[1:]], *rows, _total_row([*manifests.values()])])])


def distribution_tables(found: Mapping[str, tuple[Manifest, Statistics]]) -> str:
    """Return mean, quantiles and power-of-two histogram of each quantity, with one line per dataset, by name."""
    parts = []
    for title, quantity in QUANTITIES.items():
        by_name = {name: quantity(statistics) for name, (_, statistics) in found.items()}
        parts.append(
            text_table([[title, "counted", "mean", "median", "p95", "max"], *map(_summary_row, by_name.items())])
        )
        parts.append(text_table(_bin_rows(f"share of {title.split(',')[0]}", by_name)))
    over = [[f"segments over {CLIP + 1} tokens", "share of segments", "of tokens"]]
    for name, (_, statistics) in found.items():
        lengths = statistics.segment_tokens
        over.append([name, f"{lengths.share_above(CLIP + 1):.3%}", f"{lengths.sum_share_above(CLIP + 1):.3%}"])
    parts.append(text_table(over))
    return "\n\n".join([*parts, "\n".join(_notes(found))])


def as_json(manifest: Manifest, statistics: Statistics) -> dict[str, Any]:
    """Return the statistics of a dataset for scripts; statistics of an empty distribution are null."""
    return {
        "fingerprint": manifest.fingerprint,
        "rule": manifest.rule.spec,
        "documents": manifest.num_documents,
        "tokens": manifest.num_tokens,
        "segments": manifest.num_segments,
        "text_bytes": manifest.text_bytes,
        "tokens_counted": statistics.tokens,
        "segment_tokens": _as_json(statistics.segment_tokens)
        | {
            f"share_over_{CLIP + 1}": statistics.segment_tokens.share_above(CLIP + 1),
            f"token_share_over_{CLIP + 1}": statistics.segment_tokens.sum_share_above(CLIP + 1),
        },
        f"segments_in_{SEQ_LEN_TOKENS}_tokens": _as_json(statistics.segments_per_sequence),
        "document_tokens": _as_json(statistics.document_tokens),
    }


def _as_json(distribution: Distribution) -> dict[str, Any]:
    has_counts = distribution.count > 0
    return {
        "count": distribution.count,
        "mean": distribution.mean if has_counts else None,
        "median": distribution.quantile(0.5) if has_counts else None,
        "p95": distribution.quantile(0.95) if has_counts else None,
        "max": distribution.maximum if has_counts else None,
        "bins": {str(low): count for low, count in distribution.bins().items()},
    }


def _notes(found: Mapping[str, tuple[Manifest, Statistics]]) -> list[str]:
    """Explain what was counted."""
    notes = []
    for name, (manifest, statistics) in found.items():
        share = f"{statistics.tokens:,} of {manifest.num_tokens:,} tokens"
        spread = " in evenly spaced blocks; --all counts all" if statistics.tokens < manifest.num_tokens else ""
        notes.append(f"{name}: counted {share}{spread}.")
    notes.append(
        "Segments are counted as stored: they continue across document ends, and restart at each shard. Those of more "
        f"than {CLIP + 1} tokens reach the paper's intra clip, {CLIP}."
    )
    lengths = {manifest.rule.fixed_length for manifest, _ in found.values()}
    notes.extend(
        f"fixed:{length} counts from each document's start on disk, so a document's last tokens are added to the "
        "next one's first segment; training counts from the start of its sequence, so each segment has "
        f"{length} tokens there."
        for length in sorted(filter(None, lengths))
    )
    return notes


def _summary_row(item: tuple[str, Distribution]) -> list[str]:
    name, distribution = item
    if not distribution.count:
        return [name, "0", "-", "-", "-", "-"]
    quantiles = [f"{distribution.quantile(share):,}" for share in (0.5, 0.95)]
    return [name, f"{distribution.count:,}", f"{distribution.mean:,.2f}", *quantiles, f"{distribution.maximum:,}"]


def _bin_rows(title: str, by_name: Mapping[str, Distribution]) -> list[list[str]]:
    """Return shares per power of two, with columns from the first to the last that any dataset needs."""
    bins = {name: distribution.bins() for name, distribution in by_name.items()}
    used = {low for counts in bins.values() for low, count in counts.items() if count}
    columns = [
        low for low in sorted({low for counts in bins.values() for low in counts}) if low >= min(used, default=0)
    ]
    rows = [[title, *(f"{low:,}-" if low > 1 else f"{low}" for low in columns)]]
    for name, counts in bins.items():
        total = max(sum(counts.values()), 1)
        rows.append([name, *(_percent(counts.get(low, 0) / total) for low in columns)])
    return rows


def _percent(share: float) -> str:
    return "-" if share == 0 else f"{share:.1%}" if share >= 0.001 else "<0.1%"


def _made_with(manifest: Manifest) -> list[str]:
    ids, tokenizer = manifest.rule.token_ids, manifest.tokenizer
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return [
        f"tokenizer  {tokenizer.name}: {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint[:16]}",
        f"segments   {manifest.rule.spec}" + (f": {len(ids)} token ids ({shown})" if ids else ""),
    ]


def _total_row(manifests: Sequence[Manifest]) -> list[str]:
    counts = [(m.num_documents, m.num_tokens, m.num_segments) for m in manifests]
    documents, tokens, segments = map(sum, zip(*counts, strict=True))
    return _stats_row("all", documents, tokens, segments, sum_if_known([m.text_bytes for m in manifests]))


def _stats_row(name: str, documents: int, tokens: int, segments: int, text_bytes: int | None) -> list[str]:
    length = f"{tokens / segments:.2f}" if segments else "-"
    density = f"{1024 * segments / tokens:.2f}" if tokens else "-"
    text = "unknown" if text_bytes is None else f"{text_bytes:,}"
    return [name, f"{documents:,}", f"{tokens:,}", f"{segments:,}", text, length, density]


PANEL_HEIGHT_IN, ROW_IN = 1.9, 0.14  # of the axes with their labels, and of a row of the legend
FONT = 7.0
LEGEND_COLUMN_IN = 1.7
MOST_TICKS = 6
UNITS = {"Gi": 30, "Mi": 20, "Ki": 10}


def draw_stats(found: Mapping[str, Statistics], settings: PictureSettings = DEFAULT_PICTURE) -> "Figure":
    """Return the share of segments, sequences and documents in each power of two, by dataset name."""
    from matplotlib.figure import Figure

    width = WIDTHS_IN[settings.width]
    columns = 1 if settings.width == "column" else len(QUANTITIES)
    rows = len(QUANTITIES) // columns
    names = [printable(name) for name in found]
    legend_columns = max(1, min(len(names), int(width / LEGEND_COLUMN_IN)))
    height = rows * PANEL_HEIGHT_IN + ROW_IN * -(-len(names) // legend_columns) * (len(names) > 1) + 0.25
    with drawing():
        figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (title, quantity) in zip(panels, QUANTITIES.items(), strict=True):
            _draw_panel(axes, title, found, quantity)
        title = settings.title or ("" if len(names) > 1 else "".join(names))
        figure.suptitle(title, x=0.01, ha="left", fontsize=1.2 * FONT, fontweight="bold")
        if len(names) > 1:
            look = {"ncols": legend_columns, "fontsize": FONT, "frameon": False}
            figure.legend([*figure.axes[0].patches], names, loc="outside lower center", **look)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def _draw_panel(
    axes: "Axes", title: str, found: Mapping[str, Statistics], quantity: Callable[[Statistics], Distribution]
) -> None:
    used: list[int] = []
    for number, statistics in enumerate(found.values()):
        distribution = quantity(statistics)
        bins = list(distribution.bins().values())
        shares = [100 * count / max(distribution.count, 1) for count in bins]
        edges = [*range(len(bins) + 1)]  # powers of two at equal distances: a logarithmic axis with a bin for 0
        used += [index for index, count in enumerate(bins) if count]
        colour = COLOURS[number % len(COLOURS)]
        dashes = DASHES[number // len(COLOURS) % len(DASHES)]
        width = 1.0 + 0.7 * min(3, len(found) - 1 - number)  # equal curves show below each other
        axes.stairs(shares, edges, color=colour, linestyle=dashes, linewidth=width, fill=False)
    first, last = min(used, default=1), max(used, default=1) + 1
    lows = [0, *(1 << exponent for exponent in range(last))]
    step = -(-(last - first) // MOST_TICKS)
    axes.set_xticks(ticks := list(range(first, last + 1, step)), [_short(lows[tick]) for tick in ticks])
    axes.set_xlim(first, last)
    axes.set_xlabel(title, fontsize=FONT, color=GREY)
    axes.set_ylabel("share, %", fontsize=FONT, color=GREY)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=0.95 * FONT, length=2.5, color=GREY, labelcolor=GREY)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)


def _short(number: int) -> str:
    """Return a power of two as on a tick: plain up to 65,536, then 128Ki and so on."""
    unit, exponent = next(((unit, exponent) for unit, exponent in UNITS.items() if number >> exponent), ("", 0))
    return f"{number:,}" if number < 1 << 17 else f"{number >> exponent}{unit}"
