"""Results of a study: read from the evaluations of its runs, and written as CSV and Markdown."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_bipe.data.manifest import MANIFEST_NAME, Manifest
from megatron_bipe.eval.document_losses import DOCUMENTS_NAME, LossSums, read_documents
from megatron_bipe.study.members import Job, Member, Plan
from megatron_bipe.study.statistics import Difference, OverSeeds, paired_difference
from megatron_bipe.text_table import csv_text

RESULTS_NAME, DIFFERENCES_NAME, TABLE_NAME = "results.csv", "differences.csv", "table.md"
MAX_EXPONENT = 700.0  # exp(710) is not a float


def perplexity(nats_per_token: float) -> float:
    """Return the exponential; infinity where a diverged model's loss exceeds its range."""
    return math.exp(nats_per_token) if not nats_per_token > MAX_EXPONENT else math.inf


class Results(NamedTuple):
    """Losses of the evaluated runs, and the names of those without an evaluation."""

    plan: Plan
    losses: dict[str, dict[int, dict[int, LossSums]]]
    """By member, seed and length; members without an evaluation are absent."""
    missing: list[str]
    tokens_per_byte: dict[str, float]
    """By member: predicted tokens per byte of the held-out text; members without this fact are absent."""

    @property
    def members(self) -> list[Member]:
        """Members with at least one evaluated seed."""
        return [member for member in self.plan.members if member.name in self.losses]

    @property
    def pairs(self) -> list[tuple[Member, Member]]:
        """Evaluated members with the evaluated reference of each."""
        pairs = [(member, self.plan.reference_of(member)) for member in self.members]
        return [(member, other) for member, other in pairs if other is not None and other.name in self.losses]

    @property
    def lengths(self) -> list[int]:
        """All evaluated lengths, ascending."""
        return sorted({length for member in self.members for length in self.lengths_of(member)})

    def lengths_of(self, member: Member) -> list[int]:
        return sorted({length for by_length in self.losses[member.name].values() for length in by_length})

    def over_seeds(self, member: Member, length: int, value: Callable[[float], float] = perplexity) -> OverSeeds | None:
        """Return `value` (the perplexity by default) of the loss per token of each seed; None if there is none."""
        runs = self.losses[member.name].values()
        values = tuple(value(by_length[length].nats_per_token) for by_length in runs if length in by_length)
        return OverSeeds(values) if values else None

    def difference(self, member: Member, other: Member, length: int) -> Difference | None:
        """Subtract another member's loss; None if no seed of both was evaluated at this length."""
        names = (member.name, other.name)
        ours, reference = (
            {seed: by_length[length] for seed, by_length in self.losses[name].items() if length in by_length}
            for name in names
        )
        return paired_difference(ours, reference, names)


def read_results(plan: Plan, folder: Path) -> Results:
    """Read the evaluations in the study's folder.

    Raises:
        DataError: a file is damaged.
    """
    losses: dict[str, dict[int, dict[int, LossSums]]] = {}
    missing = []
    for job in plan.jobs(folder):
        path = job.evaluation / DOCUMENTS_NAME
        if path.is_file():
            losses.setdefault(job.member.name, {})[job.seed] = read_documents(path)
        else:
            missing.append(_missing(job))
    rates = {member.name: _tokens_per_byte(plan.data_folders(member, folder)[1]) for member in plan.members}
    return Results(plan, losses, missing, {name: rate for name, rate in rates.items() if rate is not None})


def results_csv(results: Results) -> str:
    """Return one row for each run and length."""
    keys = list(results.plan.study.grid)
    columns = ["seed", "length", "nats_per_token", "perplexity", "bits_per_byte", "num_predictions"]
    rows: list[list[object]] = [["member", *keys, *columns]]
    for member in results.members:
        for seed, by_length in results.losses[member.name].items():
            for length, sums in by_length.items():
                nats, rate = sums.nats_per_token, results.tokens_per_byte.get(member.name)
                bits = "" if rate is None else nats / math.log(2) * rate
                values = [nats, perplexity(nats), bits, int(sums.counts_M.sum())]
                rows.append([member.name, *member.values.values(), seed, length, *values])
    return csv_text(rows)


def differences_csv(results: Results) -> str:
    """Return one row for each member besides the reference and each length."""
    columns = ("member", "reference", "length", "nats_per_token", "low", "high", "num_seeds", "num_documents")
    rows: list[tuple[object, ...]] = [columns]
    for member, other in results.pairs:
        for length in results.lengths_of(member):
            found = results.difference(member, other, length)
            if found:
                rows.append((member.name, other.name, length, *found))
    return csv_text(rows)


def tables(results: Results) -> str:
    """Return perplexities, and differences if there are any, as Markdown."""
    parts = [markdown(perplexity_rows(results))]
    if results.pairs:
        parts.append("Loss minus that of the reference, in nats per token; * the interval excludes 0:\n")
        parts.append(markdown(difference_rows(results)))
    return "\n".join(parts)


def perplexity_rows(results: Results) -> Iterator[list[str]]:
    """Yield a header, and mean and standard deviation over seeds for each member."""
    yield ["member", *map(str, results.lengths)]
    for member in results.members:
        found = (results.over_seeds(member, length) for length in results.lengths)
        yield [f"`{member.name}`", *("" if value is None else shown(value) for value in found)]


def difference_rows(results: Results) -> Iterator[list[str]]:
    """Yield a header, and the differences of each member to its reference."""
    yield ["member", "reference", *map(str, results.lengths)]
    for member, other in results.pairs:
        found = (results.difference(member, other, length) for length in results.lengths)
        cells = ("" if value is None else shown_difference(value) for value in found)
        yield [f"`{member.name}`", f"`{other.name}`", *cells]


def shown(value: OverSeeds) -> str:
    deviation = "" if value.deviation is None else f" ± {value.deviation:.2f}"
    return f"{value.mean:.2f}{deviation}"


def shown_difference(value: Difference) -> str:
    mark = "*" if value.excludes_zero else ""
    return f"{value.nats:+.3f}{mark} [{value.low:+.3f}, {value.high:+.3f}]"


def markdown(rows: Iterable[list[str]]) -> str:
    """Format rows, the first of which is the header, as a table."""
    header, *others = rows
    lines = [header, ["---"] * len(header), *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _missing(job: Job) -> str:
    if job.checkpoint.exists():
        return f"{job.name} (not evaluated)"
    return f"{job.name} ({'not finished' if job.run_dir.exists() else 'not started'})"


def _tokens_per_byte(data: Path) -> float | None:
    """Return predictions per UTF-8 byte of a dataset; None if it is absent or does not record its bytes."""
    if not (data / MANIFEST_NAME).is_file():
        return None
    manifest = Manifest.load(data)
    return (manifest.num_tokens - 1) / manifest.text_bytes if manifest.text_bytes else None
