"""Counts of the lines that were read and skipped, and the limit on malformed ones."""

import logging
import os
from collections.abc import Sequence

from megatron_bipe.errors import DataError
from preprocessing.readers.parse import Malformed

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

    def add(
        self,
        malformed: Sequence[Malformed],
        *,
        num_lines: int,
        num_documents: int,
        num_empty: int,
        num_malformed: int | None = None,
    ) -> None:
        """Count one part of the input, and warn of its malformed lines.

        Blank lines do not count. `num_malformed` is needed only if `malformed` does not list all.

        Raises:
            DataError: more malformed lines than allowed.
        """
        self.num_lines += num_lines
        self.num_documents += num_documents
        self.num_empty += num_empty
        self.num_malformed += len(malformed) if num_malformed is None else num_malformed
        for line in malformed[: MALFORMED_NAMED - len(self.first_malformed)]:
            if not self._quiet:
                log.warning("Skipped %s", _named(line))
            self.first_malformed.append(line)
        allowed = self._max_malformed
        if allowed is None:
            allowed = max(MALFORMED_NAMED, int(MALFORMED_SHARE * self.num_lines))
        if self.num_malformed > allowed:
            example = malformed[0] if malformed else self.first_malformed[0]
            raise DataError(
                f"{self.num_malformed} of {self.num_lines} lines are malformed, more than the {allowed} allowed, "
                f"such as {_named(example)}",
                remedy="Fix the input, name the right --text-key or --partition-by, or raise --max-malformed",
                location=example.file,
            )

    def finish(self, inputs: Sequence[str]) -> None:
        """Log how many lines were skipped; raise `DataError` if no text was usable."""
        if self.num_malformed or self.num_empty:
            message = "Skipped %d malformed lines and %d empty texts of %d lines"
            log.warning(message, self.num_malformed, self.num_empty, self.num_lines)
        if self.num_documents == 0:
            first = f": {_named(self.first_malformed[0])}" if self.first_malformed else ""
            raise DataError(
                f"The inputs hold no text ({self.num_lines} lines, {self.num_malformed} malformed, "
                f"{self.num_empty} empty){first}",
                remedy="Check the inputs and --text-key",
                location=", ".join(inputs),
            )


def require_at_least(option: str, value: int | None, least: int) -> None:
    """Refuse a number below `least`; None is an option that was not given."""
    if value is not None and value < least:
        raise DataError(f"{option} is {value}", remedy=f"Give {least} or more", location=option)


def _named(line: Malformed) -> str:
    return f"{line.file}, line {line.line}: {line.reason}"


def printable(file: str) -> str:
    """Return a file name with its surrogates, which stand for bytes outside UTF-8, escaped."""
    return os.fsencode(file).decode(errors="backslashreplace")
