"""The plot of a study, and one self-contained page with all of its results."""

from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path

from megatron_bipe.eval.chart import Chart, Line, draw_chart, draw_svg, perplexity_chart
from megatron_bipe.eval.page import Section, definitions, facts, figure, page, paragraph, table
from megatron_bipe.eval.sequences import PROTOCOLS
from megatron_bipe.picture import picture_files
from megatron_bipe.study.results import Results, difference_rows, perplexity_rows
from megatron_bipe.study.statistics import INTERVAL, METHOD

ENCODING_KEY = "model.encoding"
_ONE_SEED = "One seed: nothing here shows how much results vary with it."
PAGE_NAME = "study.html"


def plots(results: Results) -> dict[str, bytes]:
    """Return pictures of the mean perplexities, with bands over the seeds, by file name."""
    return picture_files("perplexity", draw_chart(perplexity_lines(results, results.plan.study.title)))


def perplexity_lines(results: Results, title: str = "") -> Chart:
    """Return the chart of mean perplexity by length; bands are the least and greatest value over the seeds.

    Colours are those of the encodings if these differ. Members with equal other values have one style number, so they
    have the same style where each encoding has its own panel.
    """
    members = results.plan.members
    differ = len({member.run.model.encoding for member in members}) > 1
    others = [tuple(value for key, value in member.values.items() if key != ENCODING_KEY) for member in members]
    numbers = dict(zip(dict.fromkeys(others), range(len(others)), strict=False)) if differ else {}
    lines = []
    for number, (member, values) in enumerate(zip(members, others, strict=True)):
        if member.name in results.losses:
            found = [(length, results.over_seeds(member, length)) for length in results.lengths_of(member)]
            known = [(length, value) for length, value in found if value is not None]
            points = [(length, value.mean) for length, value in known]
            band = [(length, *value.extremes) for length, value in known if len(results.losses[member.name]) > 1]
            encoding = member.run.model.encoding if differ else ""
            style, trained = numbers.get(values, number), member.run.train.seq_len_tokens
            lines.append(Line(member.name, points, style, trained, band, encoding=encoding))
    return perplexity_chart(lines, title, band_label="range of the seeds")


def study_page(results: Results, folder: Path) -> str:
    """Return the page as HTML; `folder` is that of the study, for the command that repeats it."""
    study = results.plan.study
    lead = paragraph(escape(_summary(results)), "lead") + facts(_facts(results))
    if results.missing:
        lead += paragraph(f"Without results: {escape(', '.join(results.missing))}.", "verdict")
    sections = [Section("Perplexity by sequence length", _perplexities(results))]
    if results.pairs:
        sections.append(Section("Differences to the reference", _differences(results)))
    sections.append(Section("What is compared", _settings(results, folder)))
    return page(study.title, lead, sections, "megatron_bipe study")


def _summary(results: Results) -> str:
    trains = [member.run.train for member in results.plan.members]
    tokens = {train.steps * train.global_batch * train.seq_len_tokens for train in trains}
    return (
        f"{len(results.members)} members, which differ in {' and '.join(results.plan.study.grid)}, each trained on "
        f"{_range(tokens, 1e-6, '.1f')} million tokens in {_range({train.steps for train in trains})} steps, with "
        f"seeds {', '.join(map(str, results.plan.study.seeds))}."
    )


def _range(values: Collection[int], factor: float = 1, digits: str = ".0f") -> str:
    """Return a number that all members share, or the least and the greatest."""
    return " to ".join(f"{factor * value:,{digits}}" for value in dict.fromkeys([min(values), max(values)]))


def _facts(results: Results) -> Iterable[tuple[str, str]]:
    runs = sum(map(len, results.losses.values()))
    yield str(len(results.members)), "members"
    yield f"{runs} of {runs + len(results.missing)}", "runs evaluated"
    lengths = {member.run.train.seq_len_tokens for member in results.plan.members}
    yield _range(lengths), "training length in tokens"
    counts_M = next(iter(next(iter(next(iter(results.losses.values())).values())).values())).counts_M
    yield f"{counts_M.sum():,}", f"predictions at each length, in {(counts_M > 0).sum():,} documents"


def _perplexities(results: Results) -> str:
    chart = perplexity_lines(results)
    picture = draw_svg(chart, "Perplexity by sequence length")
    caption, note = _ONE_SEED, ""
    if len(results.plan.study.seeds) > 1:
        caption = "Lines are means over the seeds; bands reach from the lowest to the highest seed."
        note = "Mean over the seeds ± standard deviation (n - 1)."
    return (
        figure(picture, escape(" ".join(part for part in (caption, chart.note) if part)))
        + _table(list(perplexity_rows(results)))
        + (paragraph(note, "note") if note else "")
    )


def _differences(results: Results) -> str:
    explained = (
        "Loss minus that of the reference, in nats per token, over pairs of the same seed and document: a negative "
        "value is better than the reference, and 0.01 is about one percent of perplexity. "
        f"* marks intervals without 0. {METHOD} With few seeds such intervals are too narrow: three seeds allow ten "
        f"different resamples of seeds, so read the {INTERVAL:.0%} as an upper bound of what they cover."
    )
    return paragraph(escape(explained), "note") + _table(list(difference_rows(results)))


def _settings(results: Results, folder: Path) -> str:
    plan = results.plan
    evaluate, study = plan.study.evaluate, plan.study
    given = (
        "all documents" if evaluate.max_tokens is None else f"full documents of at most {evaluate.max_tokens:,} tokens"
    )
    pairs = [
        ("Base run", f"<code>{escape(str(plan.base))}</code>"),
        *((key, escape(", ".join(dict.fromkeys(member.values[key] for member in plan.members)))) for key in study.grid),
        ("Settings of all", f"<code>{escape(' '.join(study.settings) or 'those of the base run')}</code>"),
        ("Seeds", ", ".join(map(str, study.seeds))),
        ("Evaluation", escape(f"{given}; protocol {evaluate.protocol}: {PROTOCOLS[evaluate.protocol]}")),
        ("Folder", f"<code>{escape(folder.resolve().name)}</code>"),
    ]
    return definitions(pairs) + _lengths_note(results)


def _lengths_note(results: Results) -> str:
    longest = max(results.lengths)
    short = [
        f"{member.name} up to {max(results.lengths_of(member)):,}"
        for member in results.members
        if max(results.lengths_of(member)) < longest
    ]
    return paragraph(f"Evaluated as far as the encoding supports: {escape(', '.join(short))}.", "note") if short else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Format Markdown cells, whose names are in backquotes, as HTML."""
    header, *others = ([_cell(cell) for cell in row] for row in rows)
    return table(header, others)


def _cell(text: str) -> str:
    if text.startswith("`"):
        return f"<code>{escape(text.strip('`'))}</code>"
    value, bracket, interval = text.partition(" [")
    return escape(value) + (f"<small>{escape(interval.rstrip(']'))}</small>" if bracket else "")
