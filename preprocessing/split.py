"""`--split train=0.99,valid=0.005,test=0.005`: a document's split depends only on its text.

Equal texts fall into the same split, regardless of the order of the inputs and of other documents.
"""

import bisect
import itertools
import re
from dataclasses import dataclass
from typing import Self

from megatron_bipe.errors import DataError

NAME = re.compile(r"[a-z][a-z0-9_]*")
RESERVED = ("tokenizer", "unfinished")
EXAMPLE = "train=0.99,valid=0.005,test=0.005"


@dataclass(frozen=True)
class Split:
    """Names and cumulative shares of splits."""

    names: tuple[str, ...]
    bounds: tuple[float, ...]  # the last is 1

    def of(self, text_hash: bytes) -> str:
        """Return the split into whose share the text's hash falls, taken as a number in [0, 1)."""
        fraction = int.from_bytes(text_hash[:8], "little") / 2**64
        return self.names[min(bisect.bisect_right(self.bounds, fraction), len(self.names) - 1)]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse "name=share,...".

        Raises:
            DataError: the text is not such a list, a name is not allowed, or the shares do not add up to 1.
        """
        entries = [entry.strip().partition("=") for entry in text.split(",")]
        names = tuple(name.strip() for name, _, _ in entries)
        try:
            shares = [float(share) for _, _, share in entries]
        except ValueError:
            raise _wrong(f"{text!r} is not a list of names and shares") from None
        unfit = [name for name in names if not NAME.fullmatch(name) or name in RESERVED]
        if unfit or len(set(names)) < len(names):
            raise _wrong(f"the names {', '.join(names)} are not all different lower-case words")
        if not all(0 < share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-9:
            raise _wrong(f"the shares are {', '.join(map(str, shares))}; each must be above 0, and their sum 1")
        return cls(names, (*itertools.accumulate(shares[:-1]), 1.0))


def _wrong(message: str) -> DataError:
    return DataError(message, remedy=f"Write it as in {EXAMPLE}", location="--split")
