"""Counts of what was read and what was left out of it, and when to stop over the latter."""

import logging
import os
from collections.abc import Sequence

from megatron_bipe.errors import DataError
from preprocessing.readers.parse import Malformed

MALFORMED_NAMED = 10  # so many are named; also so many are always let pass
MALFORMED_SHARE = 0.01  # of the lines read so far: more of them, and the input is not what it is taken for

log = logging.getLogger(__name__)


class Tally:
    """Running counts over the inputs.

    Args:
        max_malformed: lines to let pass; None for `MALFORMED_NAMED`, or `MALFORMED_SHARE` of the lines read so far
            if that is more.
        quiet: warn of no line.
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

        Args:
            malformed: lines to name.
            num_lines: that are not blank.
            num_documents: that were used.
            num_empty: texts of no characters.
            num_malformed: where not all of them are in `malformed`.

        Raises:
            DataError: more malformed lines than are let pass.
        """
        self.num_lines += num_lines
        self.num_documents += num_documents
        self.num_empty += num_empty
        self.num_malformed += len(malformed) if num_malformed is None else num_malformed
        for line in malformed[: MALFORMED_NAMED - len(self.first_malformed)]:
            if not self._quiet:
                log.warning("Left out %s", _named(line))
            self.first_malformed.append(line)
        allowed = self._max_malformed
        if allowed is None:
            allowed = max(MALFORMED_NAMED, int(MALFORMED_SHARE * self.num_lines))
        if self.num_malformed > allowed:
            example = malformed[0] if malformed else self.first_malformed[0]
            raise DataError(
                f"{self.num_malformed} of {self.num_lines} lines are malformed, more than the {allowed} that are let "
                f"pass, such as {_named(example)}",
                remedy="Mend the input, name the right --text-key or --partition-by, or raise --max-malformed",
                location=example.file,
            )

    def finish(self, inputs: Sequence[str]) -> None:
        """Say what was left out.

        Raises:
            DataError: nothing was left to use.
        """
        if self.num_malformed or self.num_empty:
            message = "Left out %d malformed lines and %d empty texts of %d lines"
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
    """Refuse a number that is out of range; None is an option that was not given."""
    if value is not None and value < least:
        raise DataError(f"{option} is {value}", remedy=f"Give {least} or more", location=option)


def _named(line: Malformed) -> str:
    return f"{line.file}, line {line.line}: {line.reason}"


def printable(file: str) -> str:
    """A file name without the surrogates that stand for bytes outside UTF-8."""
    return os.fsencode(file).decode(errors="backslashreplace")
