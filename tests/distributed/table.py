"""Every layout of up to 8 ranks against one process; writes the table of docs/parallelism.md.

    python -m tests.distributed.table

For each way to divide 1, 2, 4 or 8 ranks among four axes, each ZeRO stage that it allows and each encoding (with
context parallelism, the encodings in turn): 8 updates in fp32 with clipping at work, a held-out loss and the weights of
a checkpoint. Stages alone also without clipping, where all but the norm must be the same bits. Exit code 1, and no
table, where a difference is larger than allowed.
"""

import itertools
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.helpers.layouts import Difference, Layout, Placed, allowed, difference, reference, run_placed, train_layouts

DOC = Path(__file__).parents[2] / "docs" / "parallelism.md"
BEGIN, END = "<!-- written by make test-parallel: begin -->", "<!-- written by make test-parallel: end -->"
MAX_RANKS, SIZES = 8, (1, 2, 4)
ENCODINGS = ("bipe_rope", "bipe_alibi", "rope", "alibi")  # of the others test_encodings.py has a few layouts
NUM_HEADS = 4  # of the model, see layouts.py


class Shape(NamedTuple):
    """One row of the table."""

    tensor: int
    context: int
    pipeline: int
    data: int
    sequence: bool
    clip: bool

    @property
    def ranks(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    def layouts(self, encoding: str) -> list[Layout]:
        """Return a layout for each ZeRO stage; the pipeline engine supports two of them."""
        plain = Layout(encoding, self.tensor, self.context, self.pipeline, sequence=self.sequence)
        layout = plain if self.clip else plain._replace(clip=0.0)
        return [layout._replace(zero=zero) for zero in range(4 if self.pipeline == 1 else 2)]


class Cell(NamedTuple):
    """Result of one layout with one encoding."""

    shape: Shape
    layout: Layout
    difference: Difference

    @property
    def is_broken(self) -> bool:
        return not self.difference.within(allowed(self.layout, self.shape.ranks))


def shapes() -> list[Shape]:
    """Return the rows of the table in order."""
    found = itertools.starmap(Shape, itertools.product(*[SIZES] * 4, (False, True), (True, False)))
    return [shape for shape in found if _is_meant(shape)]


def _is_meant(shape: Shape) -> bool:
    stages_alone = 1 < shape.pipeline == shape.ranks
    fits = shape.ranks <= MAX_RANKS and shape.tensor * shape.context <= NUM_HEADS
    return fits and (shape.tensor > 1 or not shape.sequence) and (shape.clip or stages_alone)


def rows_of(encoding: str) -> list[Shape]:
    """Return all shapes without context parallelism, and every fourth of the others, which encode like the first."""
    rows = shapes()
    split = [row for row in rows if row.context > 1]
    return [row for row in rows if row.context == 1] + split[ENCODINGS.index(encoding) :: len(ENCODINGS)]


def measure(rows: list[Shape], encoding: str, folder: Path) -> Iterator[Cell]:
    """Train all layouts of an encoding, in one launch for each number of ranks."""
    references = {Placed(1, reference(layout)) for row in rows for layout in row.layouts(encoding)}
    alone = run_placed(train_layouts, references, folder / "alone")
    for num_ranks in sorted({row.ranks for row in rows}):
        chosen = {Placed(num_ranks, x): row for row in rows if row.ranks == num_ranks for x in row.layouts(encoding)}
        sys.stderr.write(f"{encoding}: {len(chosen)} layouts of {num_ranks} ranks\n")
        found = run_placed(train_layouts, chosen, folder)
        for placed, row in chosen.items():
            [expected] = alone[Placed(1, reference(placed.layout))]
            yield Cell(row, placed.layout, difference(found[placed], expected))


def render(rows: list[Shape], cells: list[Cell]) -> str:
    """Return the table in Markdown; each figure is the largest over all encodings."""
    lines = [
        "| tensor | context | pipeline | data | sequence | clipping | ZeRO 0 | 1 | 2 | 3 | norms | weights |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        here = [cell for cell in cells if cell.shape == row]
        losses = [[cell.difference.loss for cell in here if cell.layout.zero == zero] for zero in range(4)]
        norms, weights = [cell.difference.norm for cell in here], [cell.difference.weight for cell in here]
        sizes = map(str, (row.tensor, row.context, row.pipeline, row.data))
        figures = map(_largest, (*losses, norms, weights))
        lines.append(f"| {' | '.join([*sizes, _yes(row.sequence), _yes(row.clip), *figures])} |")
    return "\n".join(lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _largest(differences: list[float]) -> str:
    if not differences:
        return ""
    return f"{max(differences):.0e}".replace("e-0", "e-") if max(differences) else "0"


def put_table(page: str, table: str) -> str:
    """Return the page with a new table between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{DOC.name} has no markers for the table"
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> int:
    # DeepSpeed's groups of ranks stay open until their process ends, and each takes sockets.
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    rows, cells = shapes(), []
    with tempfile.TemporaryDirectory() as folder:
        for encoding in ENCODINGS:
            cells += measure(rows_of(encoding), encoding, Path(folder) / encoding)
    broken = [cell for cell in cells if cell.is_broken]
    for cell in broken:
        limits = allowed(cell.layout, cell.shape.ranks)
        sys.stderr.write(f"{cell.layout} on {cell.shape.ranks} ranks: {cell.difference}; allowed: {limits}\n")
    if broken:
        return 1
    DOC.write_text(put_table(DOC.read_text(encoding="utf-8"), render(rows, cells)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
