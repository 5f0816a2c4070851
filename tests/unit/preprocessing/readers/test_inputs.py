"""Inputs are found by name, and divided into ranges."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bipe.errors import DataError
from preprocessing.readers.inputs import (
    HUB,
    KINDS,
    LEAST_RANGE_TEXT_BYTES,
    RANGES,
    Input,
    Piece,
    find_inputs,
    plan_ranges,
)
from tests.helpers.errors import raises


def test_find_inputs_globs_folders_and_files_keep_the_order_given(inputs: dict[str, Path]) -> None:
    folder = inputs["jsonl"].parent
    (folder / "notes.md").write_text("not an input")
    found = find_inputs([str(inputs["gz"]), str(folder / "*.jsonl*"), str(folder)])
    names = [str(Path(item.name).relative_to(folder)) for item in found]
    assert names == ["c.jsonl.gz", "a.jsonl", "b.jsonl.zst", *(f"d/{n}.txt" for n in range(5))]


@pytest.mark.parametrize("name", ["gone.jsonl", "*.jsonl", "empty", "notes.md"])
def test_find_inputs_nothing_usable_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    with raises(DataError, ".jsonl.zst", location=tmp_path / name):
        find_inputs([str(tmp_path / name)])


def test_find_inputs_skips_the_tokenizer_of_a_dataset(tmp_path: Path) -> None:
    for name in ("a.txt", "merges.txt", "out/tokenizer/merges.txt", "out/tokenizer/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [str(Path(item.name).relative_to(tmp_path)) for item in find_inputs([str(tmp_path)])]
    assert found == ["a.txt", "merges.txt", "out/tokenizer/a.txt"]


def test_find_inputs_linked_folder_is_named_and_a_linked_file_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, away = tmp_path / "in", tmp_path / "away"
    away.mkdir()
    folder.mkdir()
    (away / "a.jsonl").write_text("x")
    (folder / "linked").symlink_to(away)
    (folder / "b.jsonl").symlink_to(away / "a.jsonl")
    (folder / "broken.jsonl").symlink_to(away / "gone")
    (found,) = find_inputs([str(folder)])
    assert (found.name, found.size) == (str(folder / "b.jsonl"), 1)
    assert f"{folder / 'linked'} is a link to a folder" in caplog.text
    assert len(find_inputs([str(folder / "linked")])) == 1


def test_find_inputs_folder_that_may_not_be_searched_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "a.jsonl").write_text("x")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with raises(DataError, "Permission denied", location=tmp_path / "secret"):
        find_inputs([str(tmp_path)])


def test_find_inputs_file_named_twice_is_read_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    found = find_inputs(["b.txt", str(tmp_path)])
    assert [item.name for item in found] == ["b.txt", str(tmp_path / "a.txt")]
    assert "named twice" in caplog.text


@given(
    sizes=st.lists(st.tuples(st.integers(0, 10**11), st.sampled_from([".jsonl", ".jsonl.zst", ".txt"])), max_size=8),
    shard_tokens=st.integers(1, 10**10),
)
def test_plan_ranges_covers_every_byte_once_and_in_order(sizes: list[tuple[int, str]], shard_tokens: int) -> None:
    inputs = [Input(f"{n}{suffix}", KINDS[suffix], size, "") for n, (size, suffix) in enumerate(sizes)]
    at = dict.fromkeys(inputs, 0)
    order = []
    for pieces in plan_ranges(inputs, max(shard_tokens, 10**7)):
        assert pieces
        for piece in pieces:
            assert piece.start == at[piece.input]
            at[piece.input] = piece.stop
            order.append(inputs.index(piece.input))
            if not piece.input.kind.is_divisible:
                assert (piece.start, piece.stop) == (0, piece.input.size)
    assert order == sorted(order)
    assert at == {item: item.size for item in inputs}


def test_plan_ranges_groups_small_files_and_divides_large_ones() -> None:
    small = [Input(f"{n}.txt", KINDS[".txt"], 1000, "") for n in range(50_000)]
    large = Input("large.jsonl", KINDS[".jsonl"], 10**9, "")
    ranges = plan_ranges([*small, large], 1 << 30)
    sizes = [sum(piece.stop - piece.start for piece in pieces) for pieces in ranges]
    assert len(ranges) <= RANGES
    assert max(sizes) <= LEAST_RANGE_TEXT_BYTES
    assert sorted(sizes)[1] > LEAST_RANGE_TEXT_BYTES / 2  # all but the last of the small files
    one_a_shard = plan_ranges([large], 500_000)
    assert max(piece.stop - piece.start for (piece,) in one_a_shard) <= 4 * 500_000


def test_plan_ranges_parts_on_the_hub_are_a_range_each() -> None:
    item = Input("org/name", HUB, 5, "c0ffee")
    for shard_tokens in (1, 1 << 30):
        assert plan_ranges([item], shard_tokens) == [[Piece(item, n, n + 1)] for n in range(5)]


@pytest.mark.parametrize(
    ("sizes", "shard_tokens", "lengths"),
    [
        ([4 << 20] * 3, 1 << 30, [8 << 20, 4 << 20]),
        ([20 << 20], 1 << 30, [6990506, 6990507, 6990507]),
        ([20 << 20], 1, [1 << 20] * 20),
        ([256 << 25], 1 << 30, [1 << 25] * 256),
        ([300 << 30], 1 << 30, [1 << 30] * 300),
        ([300 << 30], 1 << 25, [1 << 27] * 2400),
    ],
)
def test_plan_ranges_division_never_changes(sizes: list[int], shard_tokens: int, lengths: list[int]) -> None:
    ranges = plan_ranges([Input(f"{n}.jsonl", KINDS[".jsonl"], size, "") for n, size in enumerate(sizes)], shard_tokens)
    assert [sum(piece.stop - piece.start for piece in pieces) for pieces in ranges] == lengths
