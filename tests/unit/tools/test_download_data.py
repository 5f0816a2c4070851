"""The command that fetches a dataset, run as a user runs it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from preprocessing.hub.known_datasets import DEFAULT
from tests.helpers.hub import Fault, Hub, serve

TOOL = Path(__file__).resolve().parents[3] / "tools" / "download_data.py"
VAL = "val.jsonl.zst"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "source" / "train").mkdir(parents=True)
    for path in ("train/00.jsonl.zst", "train/01.jsonl.zst", VAL):
        (tmp_path / "source" / path).write_bytes(path.encode() * 100)
    with serve({DEFAULT: {"main": tmp_path / "source"}}) as hub:
        yield hub


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_download_data_lists_then_fetches_then_finds_all_there(tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "pile"
    command = ("--output", folder, "--endpoint", hub.endpoint)
    repo = f"{DEFAULT} at commit {hub.commit(DEFAULT)}"
    listed = run(*command, "--dry-run")
    assert listed.returncode == 0, listed.stderr
    assert f"{repo}; licence: mit" in listed.stdout
    assert "  1.80kB  to fetch      train/00.jsonl.zst\n" in listed.stdout
    assert "3 file(s), 4.90kB; to fetch: 4.90kB; free on the disk: " in listed.stdout
    assert not folder.exists()
    fetched = run(*command, "--include", "train/*", VAL, "--workers", 2)
    assert fetched.returncode == 0, fetched.stderr
    assert f"{folder}: 3 file(s) of {repo}, all whole; 3 fetched now" in fetched.stdout
    assert f"\nNext: python tools/preprocess.py --tokenizer TOKENIZER --workers 8 --input {folder}/tr" in fetched.stdout
    assert (folder / VAL).read_bytes() == VAL.encode() * 100
    again = run(*command, "--dataset", "pile-val", "--verify")
    assert again.returncode == 0, again.stderr
    assert "1 file(s)" in again.stdout and "all whole; 0 fetched now" in again.stdout


def test_download_data_what_the_user_can_fix_is_one_message_and_exit_code_2(tmp_path: Path, hub: Hub) -> None:
    hub.faults.append(Fault("/api/*", status=403, error="GatedRepo"))
    refused = run("--output", tmp_path / "pile", "--endpoint", hub.endpoint)
    assert refused.returncode == 2
    assert refused.stderr.startswith("DataError: Access to this repository is granted on request")
    assert "Traceback" not in refused.stderr


def test_download_data_help_names_every_option() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    options = "output dataset include revision workers verify overwrite dry-run endpoint"
    assert all(f"--{option}" in shown.stdout for option in options.split())
