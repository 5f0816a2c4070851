"""`tools/inspect_data.py`, run as a user runs it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bipe.data.manifest import Manifest

TOOL = Path(__file__).parents[3] / "tools" / "inspect_data.py"
TEXTS = [["a cat\nsat.\n", "x\n\ny"], [], ["\u4e16\x1bz q\n", ""]]
Write = Callable[..., Manifest]


@pytest.fixture
def folder(write_text_dataset: Write, tmp_path: Path) -> Path:
    write_text_dataset(tmp_path / "data", TEXTS)
    return tmp_path / "data"


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_inspect_data_on_a_whole_dataset_leaves_with_0(folder: Path, tmp_path: Path) -> None:
    verify = run_tool("verify", folder)
    assert (verify.returncode, verify.stderr) == (0, "")
    assert "whole. 3 shards, 25 tokens" in verify.stdout
    assert "share of 0.5" in run_tool("verify", folder, "--sample", "0.5", "--workers", 1).stdout
    shown = run_tool("show", folder, "--document", "1", "--tokens", "2")
    assert shown.returncode == 0 and "... 3 more tokens" in shown.stdout
    assert "\x1b" not in shown.stdout  # not a terminal
    assert "\x1b[48;5;" in run_tool("show", folder, "--color").stdout
    made = run_tool("resegment", folder, "--segments", "fixed:4", "--output", tmp_path / "new")
    assert (made.returncode, made.stderr) == (0, "")
    assert "25 tokens, 5 segments by rule fixed:4" in made.stdout
    assert run_tool("verify", tmp_path / "new").returncode == 0


def test_inspect_data_stats_prints_tables_and_writes_what_is_asked_for(folder: Path, tmp_path: Path) -> None:
    png, figures = tmp_path / "s.png", tmp_path / "s.json"
    result = run_tool("stats", folder, "--all", "--png", png, "--json", figures)
    assert (result.returncode, result.stderr) == (0, "")
    assert "tokens/segment" in result.stdout and "counted 25 of 25 tokens" in result.stdout
    assert png.read_bytes().startswith(b"\x89PNG")
    assert json.loads(figures.read_text())[str(folder)]["segment_tokens"]["count"] == 5
    refused = run_tool("stats", folder, "--png", png)
    assert refused.returncode == 2 and "The file exists" in refused.stderr
    assert run_tool("stats", folder, "--png", png, "--overwrite").returncode == 0


def test_inspect_data_on_a_folder_of_datasets_does_all(write_text_dataset: Write, tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "valid"):
        write_text_dataset(tmp_path / name, TEXTS)
    assert "whole. 3 datasets, 9 shards, 75 tokens" in run_tool("verify", tmp_path).stdout
    rows = [line.split() for line in run_tool("stats", tmp_path).stdout.splitlines()]
    assert ["train/b", "4", "25", "5"] in [row[:4] for row in rows]
    flip(tmp_path / "train" / "b" / "part-00000.bin", 0)
    flip(tmp_path / "valid" / "part-00000.seg", 24)
    verify = run_tool("verify", tmp_path)
    assert verify.returncode == 2 and "train/b/part-00000.bin" in verify.stderr and "valid/part" in verify.stderr


def test_inspect_data_on_damage_or_bad_options_leaves_with_2_and_no_traceback(folder: Path, tmp_path: Path) -> None:
    flip(folder / "part-00000.bin", 0)
    flip(folder / "part-00002.idx", 40)
    verify = run_tool("verify", folder)
    assert verify.returncode == 2
    assert verify.stderr.count("SHA-256") == 2 and "Traceback" not in verify.stderr
    for arguments in (
        ["show", folder / "x"],
        ["stats", folder / "x"],
        ["show", folder, "--tokens", "0"],
        ["verify", folder, "--sample", "1.5"],
        ["verify", folder, "--sample", "nan"],
        ["verify", folder, "--workers", "0"],
        ["stats", folder, "--sample-tokens", "0"],
        ["stats", folder, "--json", tmp_path / "absent" / "s.json"],
        ["resegment", folder, "--segments", "newline", "--output", folder],
        ["resegment", folder / "x", "--segments", "newline", "--output", tmp_path / "new"],
    ):
        result = run_tool(*arguments)
        assert result.returncode == 2, arguments
        assert result.stderr.startswith("DataError: ") and "Traceback" not in result.stderr
