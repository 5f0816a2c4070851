"""Tables of results for a terminal."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], head: int = 1) -> str:
    """Return a table with the first column aligned left and the others right.

    Args:
        rows: rows with equally many cells.
        head: number of header rows above the line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]
    lines.insert(head, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)
