"""Counts of the lines that were read and skipped, the limit on malformed ones, and the totals over all ranges."""

import logging
import os
from collections.abc import Sequence

from megatron_bipe.data.manifest import WORK_FOLDER
from megatron_bipe.errors import DataError
from preprocessing.readers.inputs import Piece
from preprocessing.readers.parse import Malformed, Parsed
from preprocessing.work_dir import RangeRecord

MALFORMED_NAMED = 10  # lines that are reported; at least this many are allowed
MALFORMED_SHARE = 0.01  # of the lines read so far; above it, the options probably do not match the input

log = logging.getLogger(__name__)


class LineCounts:
    """Running counts over the inputs.

    Args:
        max_malformed: allowed malformed lines; None: `MALFORMED_NAMED`, or `MALFORMED_SHARE` of the lines read so far
            if that is more.
        quiet: log no warning for a line.
    """

    def __init__(self, max_malformed: int | None = None, quiet: bool = False) -> None:
        self._max_malformed, self._quiet = max_malformed, quiet
        self.num_lines = self.num_documents = self.num_empty = self.num_malformed = 0
        self.first_malformed: list[Malformed] = []

    def add_parsed(self, parsed: Parsed) -> None:
        """Count a batch of parsed lines, and warn of its malformed ones.

        Raises:
            DataError: more malformed lines than allowed.
        """
        self._add(parsed.num_lines, len(parsed.documents), parsed.num_empty, len(parsed.malformed), parsed.malformed)

    def add_range(self, record: RangeRecord, first_malformed: Sequence[Malformed]) -> None:
        """Count a finished range, and warn of its first malformed lines, numbered as they are to be reported.

        Raises:
            DataError: more malformed lines than allowed.
        """
        self._add(record.lines, record.documents, record.empty, record.malformed, first_malformed)

    def _add(
        self, num_lines: int, num_documents: int, num_empty: int, num_malformed: int, malformed: Sequence[Malformed]
    ) -> None:
        self.num_lines += num_lines
        self.num_documents += num_documents
        self.num_empty += num_empty
        self.num_malformed += num_malformed
        for line in malformed[: MALFORMED_NAMED - len(self.first_malformed)]:
            if not self._quiet:
                log.warning("Skipped %s", _describe(line))
            self.first_malformed.append(line)
        allowed = self._max_malformed
        if allowed is None:
            allowed = max(MALFORMED_NAMED, int(MALFORMED_SHARE * self.num_lines))
        if self.num_malformed > allowed:
            example = malformed[0] if malformed else self.first_malformed[0]
            raise DataError(
                f"{self.num_malformed} of {self.num_lines} lines are malformed, more than the {allowed} allowed, "
                f"such as {_describe(example)}",
                remedy="Fix the input, name the right --text-key or --partition-by, or raise --max-malformed",
                location=example.file,
            )

    def finish(self, inputs: Sequence[str]) -> None:
        """Log how many lines were skipped; raise `DataError` if no text was usable."""
        if self.num_malformed or self.num_empty:
            message = "Skipped %d malformed lines and %d empty texts of %d lines"
            log.warning(message, self.num_malformed, self.num_empty, self.num_lines)
        if self.num_documents == 0:
            first = f": {_describe(self.first_malformed[0])}" if self.first_malformed else ""
            raise DataError(
                f"The inputs hold no text ({self.num_lines} lines, {self.num_malformed} malformed, "
                f"{self.num_empty} empty){first}",
                remedy="Check the inputs and --text-key",
                location=", ".join(inputs),
            )


def sum_ranges(records: Sequence[RangeRecord], ranges: Sequence[list[Piece]], max_malformed: int | None) -> LineCounts:
    """Return the counts over all ranges, with malformed lines numbered within their files.

    If `max_malformed` is None, the default limit applies to each range as well.

    Raises:
        DataError: more malformed lines than allowed, or pieces of a file that do not fit together.
    """
    counts = LineCounts(max_malformed)
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
                raise _misfit_error(piece)
            pending[name] += end.overrun_bytes
        first_malformed = [
            line._replace(file=printable(pieces[index].input.name), line=line.line + before[index])
            for line, index in zip(record.first_malformed, record.malformed_pieces, strict=True)
        ]
        counts.add_range(record, first_malformed)
        if max_malformed is None:  # a range that ended a run also ends the next, which skips it
            LineCounts(quiet=True).add_range(record, first_malformed)
    return counts


def require_at_least(option: str, value: int | None, least: int) -> None:
    """Refuse a number below `least`; None is an option that was not given."""
    if value is not None and value < least:
        raise DataError(f"{option} is {value}", remedy=f"Give {least} or more", location=option)


def printable(file: str) -> str:
    """Return a file name with its surrogates, which stand for bytes outside UTF-8, escaped."""
    return os.fsencode(file).decode(errors="backslashreplace")


def _describe(line: Malformed) -> str:
    return f"{line.file}, line {line.line}: {line.reason}"


def _misfit_error(piece: Piece) -> DataError:
    return DataError(
        f"The parts of the file before and after byte {piece.start} do not fit together: it was changed while it was "
        "read, or it was read with different versions of zstandard or zlib",
        remedy=f"Remove the folder {WORK_FOLDER!r} in the output, and run the same command again in one environment",
        location=piece.input.name,
    )
