"""Inputs are found by name, and divided into ranges."""

import bz2
import errno
import gzip
import lzma
import os
import shutil
from pathlib import Path

import datasets
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_bipe.errors import DataError
from preprocessing.readers import inputs as inputs_module
from preprocessing.readers.documents import read_input
from preprocessing.readers.hub_dataset import HubDataset
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
from preprocessing.readers.parse import Keys
from tests.helpers.errors import assert_warned, raises


def test_find_inputs_globs_folders_and_files_keep_the_order_given(inputs: dict[str, Path]) -> None:
    folder = inputs["jsonl"].parent
    (folder / "notes.md").write_text("not an input")
    found = find_inputs([str(inputs["gz"]), str(folder / "*.jsonl*"), str(folder)])
    names = [str(Path(item.name).relative_to(folder)) for item in found]
    assert names == ["c.jsonl.gz", "a.jsonl", "b.jsonl.zst", *(f"d/{n}.txt" for n in range(5))]


@pytest.mark.parametrize("name", ["*.jsonl", "empty", "notes.md"])
def test_find_inputs_nothing_usable_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty2").mkdir()
    (tmp_path / "notes.md").write_text("x")
    with raises(DataError, ".jsonl", ".zst", location=tmp_path / name) as caught:
        find_inputs([str(tmp_path / name)])
    assert "there is" not in str(caught.value)


def test_find_inputs_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text("x")
    with raises(DataError, "no such file", location=tmp_path / "note.jsonl", remedy="notes.jsonl"):
        find_inputs([str(tmp_path / "note.jsonl")])


LINE = b'{"text": "a"}\n'
READ = (
    "C.JSONL", "a.jsonl", "b.json.gz", "c.json", "d.Jsonl.Zst", "e.jsonl.bz2", "f.json.xz", "g.ndjson", "h/i.jsonl.gz",
    "j.txt.gz", "saved/data-00000-of-00001.arrow", "t.arrow",
)  # fmt: skip
SKIPPED = (
    "README.md", "split/datasets.json", "table.csv.gz", "_SUCCESS", ".hidden.jsonl", ".git/a.jsonl",
    "dataset_info.json", "cache-0af.arrow", "saved/cache-0af.arrow", "unfinished/00000/range.json",
)  # fmt: skip


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with files of every kind that is read, and with others."""
    pack = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    folder = tmp_path / "in"
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder / "saved")
    for name in (*READ, *SKIPPED, "unfinished/job.json"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.write_bytes(pack.get(file.suffix.lower(), bytes)(b"a" if ".txt" in name else LINE))
    shutil.copy(folder / "saved/data-00000-of-00001.arrow", folder / "t.arrow")
    return folder


@pytest.mark.parametrize("pattern", ["", "*", "**", "**/*"])
def test_find_inputs_folder_and_pattern_give_all_files_and_name_the_others(
    mixed: Path, caplog: pytest.LogCaptureFixture, pattern: str
) -> None:
    found = find_inputs([f"{mixed}/{pattern}"])
    assert len({Path(item.name).resolve() for item in found}) == len(found)
    names = [str(Path(item.name).resolve().relative_to(mixed)) for item in found]
    assert sorted(names) == list(READ)
    assert [doc.text for item in found for parsed in read_input(item, Keys()) for doc in parsed.documents] == ["a"] * 12
    if pattern != "**/*":
        assert_warned(
            caplog, mixed, "1 of kind .md (README.md)", "1 of kind .csv.gz", "1 without a suffix (_SUCCESS)",
            "1 caches", "1 not part of the saved dataset (cache-0af.arrow)",
            "2 metadata (dataset_info.json, datasets.json)", "2 of an unfinished dataset (job.json, range.json)",
        )  # fmt: skip
    assert pattern or "2 hidden (.git, .hidden.jsonl)" in caplog.text  # a pattern does not match them


def test_find_inputs_all_files_read_is_no_warning(inputs: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    find_inputs([str(inputs["jsonl"].parent)])
    assert not caplog.records


def test_find_inputs_dataset_with_splits_in_a_folder_is_an_error(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "in/all")
    for entry in ("in", "in/*", "in/all", "in/all/*"):
        with raises(DataError, "train", location=tmp_path / "in/all"):
            find_inputs([str(tmp_path / entry)])


def test_find_inputs_hub_name_is_not_taken_for_a_mistyped_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inputs_module, "open_hub", lambda name: HubDataset(3, "c0ffee"))
    with caplog.at_level("INFO"):
        assert find_inputs(["org/name"]) == [Input("org/name", HUB, 3, "c0ffee")]
    assert "org/name is not a path" in caplog.text and "c0ffee" in caplog.text
    (tmp_path / "data/pile").mkdir(parents=True)
    with raises(DataError, "'data'", location="data/piel", remedy="data/pile"):
        find_inputs(["data/piel"])
    for entry in ("./data", "../pile", "data/pile.json"):
        with raises(DataError):
            find_inputs([entry])


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
