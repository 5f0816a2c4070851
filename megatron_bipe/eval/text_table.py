"""Results for a terminal."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], head: int = 1) -> str:
    """Columns as wide as they need to be, the first to the left, the others to the right.

    Args:
        rows: of equally many cells.
        head: rows above the line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if position else cell.ljust(width) for position, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]
    lines.insert(head, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)
