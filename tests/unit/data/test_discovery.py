"""Discovery of the datasets in a folder, and their tokenizers."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bipe.data.dataset import TokenDataset, find_datasets, open_tokenizer
from megatron_bipe.data.inspection.show import show_document
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.errors import DataError
from tests.helpers.errors import raises

Write = Callable[..., Manifest]


def test_find_datasets_in_a_dataset_is_itself(folder: Path) -> None:
    assert find_datasets(folder) == [folder]


def test_find_datasets_one_and_two_levels_down_finds_all_by_name(write_dataset: Write, tmp_path: Path) -> None:
    for name in ("b", "a/y", "a/x", "z/z/z"):
        write_dataset(tmp_path / name, [[[1, 5]]])
    assert find_datasets(tmp_path) == [tmp_path / "b", tmp_path / "a/x", tmp_path / "a/y"]


def test_find_datasets_without_any_returns_the_folder_so_that_opening_it_reports_the_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert find_datasets(tmp_path) == [tmp_path]
    assert find_datasets(tmp_path / "absent") == [tmp_path / "absent"]
    with raises(DataError, "manifest.json", location=tmp_path, remedy="tools/preprocess.py"):
        TokenDataset(tmp_path)


def test_find_datasets_with_shards_that_have_no_manifest_names_their_folders(
    write_dataset: Write, tmp_path: Path
) -> None:
    for name in ("a", "b/x", "b/y"):
        write_dataset(tmp_path / name, [[[1, 5]]])
    (tmp_path / "b" / "x" / "manifest.json").unlink()
    with raises(DataError, 1, "manifest.json", "b/x", location=tmp_path):
        find_datasets(tmp_path)


def show(folder: Path, document: int = 0, tokens: int = 100, color: bool = False, width: int = 80) -> str:
    dataset = TokenDataset(folder)
    return show_document(dataset, open_tokenizer(dataset), document, tokens, color=color, width=width)


def test_show_plain_shows_both_ids_with_each_token(folder: Path) -> None:
    assert show(folder).splitlines() == [
        "document 0 of 4 (part-00000): 12 tokens, 2 segment ends by rule newline",
        " inter  token, and its intra id below it",
        "     0  <bos> a · c a t ↵",
        "        0     1 2 3 4 5 6",
        "     1  s a t . ↵",
        "        0 1 2 3 4",
    ]


def test_show_of_a_later_shard_escapes_controls_and_counts_wide_characters(folder: Path) -> None:
    assert show(folder, document=2).splitlines()[2:] == [
        "     0  <bos> 世 \\x1b z · q ↵",
        "        0     1  2    3 4 5 6",
    ]


def test_show_in_a_narrow_terminal_wraps_segments(folder: Path) -> None:
    assert show(folder, width=18).splitlines()[2:8] == [
        "     0  <bos> a ·",
        "        0     1 2",
        "        c a t ↵",
        "        3 4 5 6",
        "     1  s a t . ↵",
        "        0 1 2 3 4",
    ]


def test_show_of_a_part_reports_the_remainder(folder: Path) -> None:
    lines = show(folder, tokens=3).splitlines()
    assert lines[2:] == ["     0  <bos> a ·", "        0     1 2", "... 9 more tokens"]


def test_show_in_colour_alternates_backgrounds_and_is_the_same_text(folder: Path) -> None:
    colored = show(folder, document=1, color=True)
    backgrounds = re.findall(r"\x1b\[48;5;(\d+)m", colored)
    assert backgrounds == ["24", "94", "24"]
    bare = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    assert [line.rstrip() for line in bare.splitlines()] == show(folder, document=1).splitlines()


@pytest.mark.parametrize("document", [-1, 4])
def test_show_of_a_document_that_is_not_there_is_refused(folder: Path, document: int) -> None:
    with raises(DataError, document, 4, location=f"{folder}, --document"):
        show(folder, document)
