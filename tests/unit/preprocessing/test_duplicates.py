"""Duplicates: the first of equal texts stays, whatever the rounds."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from preprocessing import duplicates
from preprocessing.duplicates import has_dropped, has_hashes, hash_rows, load_dropped, mark_duplicates, save_hashes


@pytest.mark.parametrize("rows_a_round", [1, 7, 1000])
def test_mark_duplicates_keeps_the_first_of_each_text(tmp_path: Path, rows_a_round: int) -> None:
    numbers = np.random.default_rng(0).integers(0, 60, size=(5, 30))
    texts = [[f"text {n}" for n in row] for row in numbers]
    texts[2] = []
    folders = [tmp_path / str(n) for n in range(5)]
    for folder, part in zip(folders, texts, strict=True):
        assert not has_hashes(folder)
        save_hashes(folder, [hash_rows(part[:9]), hash_rows(part[9:])])
        assert has_hashes(folder) and not has_dropped(folder)
    seen: set[str] = set()
    expected = [[text in seen or seen.add(text) is not None for text in part] for part in texts]
    with mock.patch.object(duplicates, "_repeats", wraps=duplicates._repeats) as repeats:
        assert mark_duplicates(folders, rows_a_round) == sum(map(sum, expected))
    assert repeats.call_count == -(-120 // rows_a_round)
    assert [load_dropped(folder).tolist() for folder in folders] == expected


def test_repeats_rows_that_share_half_a_hash_are_different() -> None:
    rows = np.array([[1, 2], [1, 3], [2, 3], [3, 1], [1, 2], [1, 2]], dtype=np.uint64)
    assert duplicates._repeats(rows).tolist() == [False] * 4 + [True] * 2
