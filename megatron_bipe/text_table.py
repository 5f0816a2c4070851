"""Tables as plain text, which looks the same on a terminal, in a pipe and in a file, and as CSV."""

import csv
import io
from collections.abc import Collection, Iterable, Sequence


def text_table(rows: Sequence[Sequence[str]], head: int = 0, left: Collection[int] = (0,)) -> str:
    """Return aligned columns.

    Args:
        rows: rows with equally many cells.
        head: number of header rows above a line of dashes; 0: no line.
        left: indices of the columns that are aligned left; the others are aligned right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    if head:
        lines.insert(head, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
