"""The command that downloads a dataset, against a stand-in for the Hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_bipe.errors import DataError
from preprocessing.hub.plan import DEFAULT
from tests.helpers.hub import Fault, Hub, serve
from tests.helpers.tools import assert_refuses, call_tool

VAL = "val.jsonl.zst"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "source" / "train").mkdir(parents=True)
    for path in ("train/00.jsonl.zst", "train/01.jsonl.zst", VAL):
        (tmp_path / "source" / path).write_bytes(path.encode() * 100)
    with serve({DEFAULT: {"main": tmp_path / "source"}}) as hub:
        yield hub


def test_download_data_lists_then_fetches_then_finds_all_there(tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "pile"
    options = ("--output", folder, "--endpoint", hub.endpoint)
    repo = f"{DEFAULT} at commit {hub.commit(DEFAULT)}"
    listed = call_tool("download_data", *options, "--dry-run").output
    assert f"{repo}; licence: mit" in listed
    assert "  1.80kB  to fetch      train/00.jsonl.zst\n" in listed
    assert "3 file(s), 4.90kB; to fetch: 4.90kB; free on the disk: " in listed
    assert not folder.exists()
    fetched = call_tool("download_data", *options, "--include", "train/*", VAL, "--workers", 2).output
    assert f"{folder}: 3 file(s) of {repo}, all complete; 3 fetched now" in fetched
    assert f"\nNext: python tools/preprocess.py --tokenizer TOKENIZER --workers 8 --input {folder}/tr" in fetched
    assert (folder / VAL).read_bytes() == VAL.encode() * 100
    again = call_tool("download_data", *options, "--dataset", "pile-val", "--verify").output
    assert "1 file(s)" in again and "0 fetched" in again


def test_download_data_refused_by_the_hub_is_one_message(tmp_path: Path, hub: Hub) -> None:
    hub.faults.append(Fault("/api/*", status=403, error="GatedRepo"))
    assert_refuses(
        "download_data", ["--output", tmp_path / "pile", "--endpoint", hub.endpoint], DataError, location=DEFAULT
    )


def test_download_data_help_names_every_option() -> None:
    shown = call_tool("download_data", "--help").output
    options = "output dataset include revision workers verify overwrite dry-run endpoint"
    assert all(f"--{option}" in shown for option in options.split())
