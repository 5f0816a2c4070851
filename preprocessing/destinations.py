"""Choose the dataset of each document, and find the documents that are skipped because their text occurred before.

`--split train=0.99,valid=0.005,test=0.005` gives equal texts the same split, regardless of the order of the inputs and
of other documents. Both decisions depend on a text only through its hash, 128 bits of BLAKE2b. Duplicates are found
before anything is tokenized: each range's folder holds the hashes of its texts, one row per text, and several rounds of
comparison bound the memory.
"""

import bisect
import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from megatron_bipe.errors import DataError
from megatron_bipe.io import atomic_file

SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")
RESERVED_SPLITS = ("tokenizer", "unfinished")
SPLIT_EXAMPLE = "train=0.99,valid=0.005,test=0.005"
HASH_BYTES = 16  # the probability that two texts of a corpus of 10^12 share a hash is below 10^-14
ROWS_A_ROUND = 1 << 26  # 1 GiB of hashes, and about three times that while they are sorted
HASHES_NAME, DROPPED_NAME = "hashes.npy", "dropped.npy"

HashRows = npt.NDArray[np.uint64]


class Destination(NamedTuple):
    """Dataset that a document goes to."""

    split: Annotated[str, Field(pattern=rf"^({SPLIT_NAME.pattern})?$")]  # "" if the output is not split
    partition: str  # "" if the output is not partitioned


def text_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()


@dataclass(frozen=True)
class Split:
    """Names and cumulative shares of splits."""

    names: tuple[str, ...]
    bounds: tuple[float, ...]  # the last is 1

    def choose(self, digest: bytes) -> str:
        """Return the split whose share contains the hash of a text, read as a number in [0, 1)."""
        fraction = int.from_bytes(digest[:8], "little") / 2**64
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
            raise _split_error(f"{text!r} is not a list of names and shares") from None
        unfit = [name for name in names if not SPLIT_NAME.fullmatch(name) or name in RESERVED_SPLITS]
        if unfit or len(set(names)) < len(names):
            raise _split_error(f"the names {', '.join(names)} are not all different lower-case words")
        if not all(0 < share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-9:
            raise _split_error(f"the shares are {', '.join(map(str, shares))}; each must be above 0, and their sum 1")
        return cls(names, (*itertools.accumulate(shares[:-1]), 1.0))


def _split_error(message: str) -> DataError:
    return DataError(message, remedy=f"Write it as in {SPLIT_EXAMPLE}", location="--split")


def hash_rows(texts: Iterable[str]) -> HashRows:
    """Return the hashes of texts, [texts, 2]."""
    joined = b"".join(text_hash(text) for text in texts)
    return np.frombuffer(joined, dtype="<u8").reshape(-1, HASH_BYTES // 8)


def save_hashes(folder: Path, parts: Sequence[HashRows]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / HASHES_NAME, np.concatenate([hash_rows([]), *parts]))


def has_hashes(folder: Path) -> bool:
    return (folder / HASHES_NAME).exists()


def are_duplicates_marked(folder: Path) -> bool:
    return (folder / DROPPED_NAME).exists()


def load_duplicates(folder: Path) -> npt.NDArray[np.bool_]:
    """Return a mask over a range's texts: True for each that equals an earlier text."""
    dropped: npt.NDArray[np.bool_] = np.load(folder / DROPPED_NAME)
    return dropped


def mark_duplicates(folders: Sequence[Path], rows_a_round: int = ROWS_A_ROUND) -> int:
    """Find the duplicates over all ranges, in order; save a mask of them in each folder and return their number."""
    hashes = [np.load(folder / HASHES_NAME, mmap_mode="r") for folder in folders]
    masks = [np.zeros(len(rows), np.bool_) for rows in hashes]
    rounds = np.uint64(max(1, -(-sum(map(len, hashes)) // rows_a_round)))
    for turn in range(int(rounds)):
        indices = [np.flatnonzero(rows[:, 0] % rounds == turn) for rows in hashes]
        repeats = _find_repeats(np.concatenate([rows[index] for rows, index in zip(hashes, indices, strict=True)]))
        bounds = np.cumsum([index.size for index in indices])[:-1]
        for mask, index, found in zip(masks, indices, np.split(repeats, bounds), strict=True):
            mask[index] = found
    for folder, mask in zip(folders, masks, strict=True):
        _save(folder / DROPPED_NAME, mask)
    return int(sum(np.count_nonzero(mask) for mask in masks))


def _find_repeats(rows: HashRows) -> npt.NDArray[np.bool_]:
    """Return True for each row that equals an earlier one."""
    order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable: equal rows keep their order
    in_order = rows[order]
    repeats = np.zeros(len(rows), np.bool_)
    repeats[order[1:]] = (in_order[1:] == in_order[:-1]).all(axis=1)
    return repeats


def _save(path: Path, array: npt.NDArray[np.generic]) -> None:
    with atomic_file(path) as stream:
        np.save(stream, array)
