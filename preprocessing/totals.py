"""Total the records of all ranges, and check that the pieces that were read fit together."""

from collections.abc import Sequence

from megatron_bipe.errors import DataError
from preprocessing.line_counts import LineCounts, printable
from preprocessing.readers.inputs import Piece
from preprocessing.readers.parse import Malformed
from preprocessing.work_dir import WORK_FOLDER, RangeRecord


def tally_of(records: Sequence[RangeRecord], ranges: Sequence[list[Piece]], max_malformed: int | None) -> LineCounts:
    """Return the totals, with malformed lines numbered within their files.

    If `max_malformed` is None, the default limit applies to each range as well.

    Raises:
        DataError: more malformed lines than allowed, or pieces of a file that do not fit together.
    """
    tally = LineCounts(max_malformed)
    lines: dict[str, int] = {}  # counted so far, by input
    pending: dict[str, int] = {}  # bytes that a line took beyond its piece, which the next pieces must skip
    for record, pieces in zip(records, ranges, strict=True):
        before = []
        for piece, end in zip(pieces, record.ends, strict=True):
            name = piece.input.name
            before.append(lines.get(name, 0))
            lines[name] = before[-1] + end.num_lines
            pending[name] = pending.get(name, 0) - end.skipped_bytes
            if pending[name] != 0 and (end.num_lines or end.overrun_bytes or piece.stop == piece.input.size):
                raise _misfit(piece)
            pending[name] += end.overrun_bytes
        named = [
            bad._replace(file=printable(pieces[index].input.name), line=bad.line + before[index])
            for bad, index in zip(record.first_malformed, record.malformed_pieces, strict=True)
        ]
        add_range(tally, record, named)
        if max_malformed is None:
            add_range(
                LineCounts(quiet=True), record, named
            )  # a range that ended a run also ends the next, which skips it
    return tally


def add_range(tally: LineCounts, record: RangeRecord, named: Sequence[Malformed]) -> None:
    """Add a range's counts to a tally; `named` are its first malformed lines, numbered as they are reported."""
    tally.add(
        named,
        num_lines=record.lines,
        num_documents=record.documents,
        num_empty=record.empty,
        num_malformed=record.malformed,
    )


def _misfit(piece: Piece) -> DataError:
    return DataError(
        f"The parts of the file before and after byte {piece.start} do not fit together: it was changed while it was "
        "read, or it was read with different versions of zstandard or zlib",
        remedy=f"Remove the folder {WORK_FOLDER!r} in the output, and run the same command again in one environment",
        location=piece.input.name,
    )
