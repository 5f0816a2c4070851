"""Records of all ranges -> totals over the inputs, and whether the pieces that were read fit together."""

from collections.abc import Sequence

from megatron_bipe.errors import DataError
from preprocessing.line_counts import Tally, printable
from preprocessing.readers.inputs import Piece
from preprocessing.readers.parse import Malformed
from preprocessing.work_dir import WORK_FOLDER, RangeRecord


def tally_of(records: Sequence[RangeRecord], ranges: Sequence[list[Piece]], max_malformed: int | None) -> Tally:
    """Totals, and malformed lines by their numbers in their files.

    Args:
        records: of all ranges, in order.
        ranges: their pieces.
        max_malformed: as `Tally` takes it; None holds for each range alone too.

    Raises:
        DataError: more malformed lines than are let pass, or pieces of a file do not fit together.
    """
    tally = Tally(max_malformed)
    lines: dict[str, int] = {}  # passed in each input
    owed: dict[str, int] = {}  # bytes that a line took beyond its piece, for the next ones to skip
    for record, pieces in zip(records, ranges, strict=True):
        before = []
        for piece, end in zip(pieces, record.ends, strict=True):
            name = piece.input.name
            before.append(lines.get(name, 0))
            lines[name] = before[-1] + end.num_lines
            owed[name] = owed.get(name, 0) - end.skipped_bytes
            if owed[name] != 0 and (end.num_lines or end.overrun_bytes or piece.stop == piece.input.size):
                raise _misfit(piece)
            owed[name] += end.overrun_bytes
        named = [
            bad._replace(file=printable(pieces[place].input.name), line=bad.line + before[place])
            for bad, place in zip(record.first_malformed, record.malformed_pieces, strict=True)
        ]
        add_range(tally, record, named)
        if max_malformed is None:
            add_range(Tally(quiet=True), record, named)  # what ended a run must not pass in the next, which has it done
    return tally


def add_range(tally: Tally, record: RangeRecord, named: Sequence[Malformed]) -> None:
    """Count a range.

    Args:
        tally: to count it in.
        record: of the range.
        named: its first malformed lines, by the numbers they are to be called by.

    Raises:
        DataError: more malformed lines than are let pass.
    """
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
        "read, or different versions of zstandard or zlib took part",
        remedy=f"Remove the folder {WORK_FOLDER!r} in the output, and run the same command again in one environment",
        location=piece.input.name,
    )
