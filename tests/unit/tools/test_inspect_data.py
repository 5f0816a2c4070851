"""`tools/inspect_data.py` on complete and on damaged datasets."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bipe.data.manifest import Manifest
from megatron_bipe.errors import ConfigError, DataError
from tests.helpers.datasets import FEW_TEXTS
from tests.helpers.tools import assert_refuses, call_tool

Write = Callable[..., Manifest]


@pytest.fixture
def folder(write_text_dataset: Write, tmp_path: Path) -> Path:
    write_text_dataset(tmp_path / "data", FEW_TEXTS)
    return tmp_path / "data"


def inspect(*arguments: object) -> str:
    return call_tool("inspect_data", *arguments).output


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_inspect_data_on_a_whole_dataset_leaves_with_0(folder: Path, tmp_path: Path) -> None:
    verified = inspect("verify", folder)
    assert verified.startswith(f"{folder}: ") and "3 shards, 25 tokens" in verified and len(verified.splitlines()) == 1
    assert "0.5" in inspect("verify", folder, "--sample", "0.5", "--workers", 1)
    shown = inspect("show", folder, "--document", "1", "--tokens", "2")
    assert "... 3 more tokens" in shown
    assert "\x1b" not in shown  # not a terminal
    assert "\x1b[48;5;" in inspect("show", folder, "--color")
    made = inspect("resegment", folder, "--segments", "fixed:4", "--output", tmp_path / "new")
    assert made == f"{tmp_path / 'new'}: 25 tokens, 5 segments by rule fixed:4\n"
    inspect("verify", tmp_path / "new")


def test_inspect_data_stats_prints_tables_and_writes_what_is_asked_for(folder: Path, tmp_path: Path) -> None:
    png, figures = tmp_path / "s.png", tmp_path / "s.json"
    shown = inspect("stats", folder, "--all", "--png", png, "--json", figures)
    assert "tokens/segment" in shown and "25 of 25 tokens" in shown
    assert png.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "s.pdf").read_bytes().startswith(b"%PDF") and "<svg" in (tmp_path / "s.svg").read_text()
    assert json.loads(figures.read_text())[str(folder)]["segment_tokens"]["count"] == 5
    assert_refuses("inspect_data", ["stats", folder, "--png", png], DataError, "--overwrite", location=png)
    inspect("stats", folder, "--png", png, "--overwrite", "--formats", "svg")
    assert_refuses("inspect_data", ["stats", folder, "--png", "s.jpg"], ConfigError, "jpg")
    assert_refuses("inspect_data", ["stats", folder, "--png", "s.pdf"], DataError, ".png", location="--png")


def test_inspect_data_on_a_folder_of_datasets_does_all(write_text_dataset: Write, tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "valid"):
        write_text_dataset(tmp_path / name, FEW_TEXTS)
    assert "3 datasets, 9 shards, 75 tokens" in inspect("verify", tmp_path)
    rows = [line.split() for line in inspect("stats", tmp_path).splitlines()]
    assert ["train/b", "4", "25", "5"] in [row[:4] for row in rows]
    flip(tmp_path / "train" / "b" / "part-00000.bin", 0)
    flip(tmp_path / "valid" / "part-00000.seg", 24)
    found = call_tool("inspect_data", "verify", tmp_path, code=2).output
    assert "train/b/part-00000.bin" in found and "valid/part" in found


def test_inspect_data_on_damage_names_each_file_and_leaves_with_2(folder: Path) -> None:
    flip(folder / "part-00000.bin", 0)
    flip(folder / "part-00002.idx", 40)
    found = call_tool("inspect_data", "verify", folder, code=2).output
    assert found.count("SHA-256") == 2 and "Traceback" not in found
    assert all(name in found for name in ("part-00000.bin", "part-00002.idx"))


def test_inspect_data_resegment_converts_pairs_of_megatron(folder: Path, tmp_path: Path) -> None:
    for suffix in ("bin", "idx"):
        (folder / f"part-00000.{suffix}").rename(tmp_path / f"x_text_document.{suffix}")
    made = inspect(
        *("resegment", tmp_path / "x_text_document", "--tokenizer", folder / "tokenizer"),
        *("--segments", "newline", "--output", tmp_path / "new"),
    ).splitlines()
    assert made == [
        f"{tmp_path / 'new'}: 17 tokens, 4 segments by rule newline",
        "2 documents: 2 begin with BOS, 0 end with EOS, 0 are empty",
    ]
    inspect("verify", tmp_path / "new")
    assert "unknown" in inspect("stats", tmp_path / "new")


@pytest.mark.parametrize(
    ("arguments", "observed", "location"),
    [
        ("show {data}/x", "preprocess.py", "data/x"),
        ("stats {data}/x", "preprocess.py", "data/x"),
        ("show {data} --tokens 0", "0", "--tokens"),
        ("verify {data} --sample 1.5", "1.5", "--sample"),
        ("verify {data} --sample nan", "nan", "--sample"),
        ("verify {data} --workers 0", "0", "--workers"),
        ("stats {data} --sample-tokens 0", "0", "--sample-tokens"),
        ("stats {data} --json {data}/absent/s.json", "", "absent/s.json"),
        ("stats {data} --json {data}/manifest.json --overwrite", "belongs to the dataset", "manifest.json"),
        ("resegment {data} --segments newline --output {data}", "", "data"),
        ("resegment {data}/x --segments newline --output {data}/new", "preprocess.py", "data/x"),
        ("resegment {data} --tokenizer {data}/tokenizer --segments newline --output {data}-2", "--tokenizer", "data"),
        (
            "resegment {data}/tokenizer --tokenizer {data}/tokenizer --segments newline --output {data}-2",
            "",
            "tokenizer",
        ),
        ("resegment {data}/x --tokenizer {data}/tokenizer --segments newline --output {data}-2", "", "data/x"),
    ],
)
def test_inspect_data_with_bad_options_refuses(
    folder: Path, arguments: str, observed: str, location: str | None
) -> None:
    assert_refuses("inspect_data", arguments.format(data=folder).split(), DataError, observed, location=location)
