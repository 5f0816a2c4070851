"""Find texts that equal an earlier one, by their hashes and before anything is tokenized.

Hashes are 128 bits of BLAKE2b. Each range's folder holds its own, one row per text; several rounds of comparison bound
the memory.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_bipe.io import partial_path, sync
from preprocessing.encode import HASH_BYTES, text_hash

ROWS_A_ROUND = 1 << 26  # 1 GiB of hashes, and about three times that while they are sorted
HASHES_NAME, DROPPED_NAME = "hashes.npy", "dropped.npy"

HashRows = npt.NDArray[np.uint64]


def hash_rows(texts: Iterable[str]) -> HashRows:
    """Return the hashes of texts, [texts, 2]."""
    joined = b"".join(text_hash(text) for text in texts)
    return np.frombuffer(joined, dtype="<u8").reshape(-1, HASH_BYTES // 8)


def save_hashes(folder: Path, parts: Sequence[HashRows]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / HASHES_NAME, np.concatenate([hash_rows([]), *parts]))


def has_hashes(folder: Path) -> bool:
    return (folder / HASHES_NAME).exists()


def has_dropped(folder: Path) -> bool:
    """Return True if the duplicates of a range are known."""
    return (folder / DROPPED_NAME).exists()


def load_dropped(folder: Path) -> npt.NDArray[np.bool_]:
    """Return a mask over a range's texts: True for each that equals an earlier text."""
    dropped: npt.NDArray[np.bool_] = np.load(folder / DROPPED_NAME)
    return dropped


def mark_duplicates(folders: Sequence[Path], rows_a_round: int = ROWS_A_ROUND) -> int:
    """Find the duplicates over all ranges, in order; save a mask of them in each folder and return their number."""
    hashes = [np.load(folder / HASHES_NAME, mmap_mode="r") for folder in folders]
    dropped = [np.zeros(len(rows), np.bool_) for rows in hashes]
    rounds = np.uint64(max(1, -(-sum(map(len, hashes)) // rows_a_round)))
    for turn in range(int(rounds)):
        indices = [np.flatnonzero(rows[:, 0] % rounds == turn) for rows in hashes]
        repeats = _repeats(np.concatenate([rows[index] for rows, index in zip(hashes, indices, strict=True)]))
        bounds = np.cumsum([index.size for index in indices])[:-1]
        for flags, index, found in zip(dropped, indices, np.split(repeats, bounds), strict=True):
            flags[index] = found
    for folder, flags in zip(folders, dropped, strict=True):
        _save(folder / DROPPED_NAME, flags)
    return int(sum(np.count_nonzero(flags) for flags in dropped))


def _repeats(rows: HashRows) -> npt.NDArray[np.bool_]:
    """Return True for each row that equals an earlier one."""
    order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable: equal rows keep their order
    in_order = rows[order]
    repeats = np.zeros(len(rows), np.bool_)
    repeats[order[1:]] = (in_order[1:] == in_order[:-1]).all(axis=1)
    return repeats


def _save(path: Path, array: npt.NDArray[np.generic]) -> None:
    partial = partial_path(path)
    with partial.open("wb") as stream:
        np.save(stream, array)
    sync(partial)
    partial.replace(path)
