"""The commands that make tokenizers and datasets, run as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

from megatron_bipe.data.dataset import TokenDataset

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_train_then_preprocess_then_refuse_to_overwrite(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"body": f"{n} words , and a stop .\n"}) + "\n" for n in range(200)) + "bad\n")
    trained = run(
        "train_tokenizer.py", "--input", file, "--vocab-size", 285, "--output", tmp_path / "tok", "--text-key", "body"
    )
    assert trained.returncode == 0, trained.stderr
    assert f"{tmp_path / 'tok'}: 285 tokens" in trained.stdout
    command = ("--input", file, "--tokenizer", tmp_path / "tok", "--output", tmp_path / "out", "--text-key", "body")
    made = run("preprocess.py", *command, "--workers", 2, "--segments", "newline")
    assert made.returncode == 0, made.stderr
    assert "200 documents" in made.stdout
    assert f"{file}, line 201: no JSON" in made.stderr
    assert "MB/s" in made.stderr
    assert TokenDataset(tmp_path / "out").manifest.num_documents == 200
    refused = run("preprocess.py", *command)
    assert refused.returncode == 2
    assert refused.stderr.startswith("DataError: ") and "--overwrite" in refused.stderr
    assert "Traceback" not in refused.stderr
    too_large = run(
        "train_tokenizer.py", "--input", file, "--vocab-size", 9999, "--output", tmp_path / "x", "--text-key", "body"
    )
    assert too_large.returncode == 2
    assert "largest possible size" in too_large.stderr


def test_preprocess_help_names_every_option() -> None:
    shown = run("preprocess.py", "--help")
    assert shown.returncode == 0
    options = "input tokenizer output segments workers partition-by shard-tokens text-key special-in-text max-malformed"
    assert all(f"--{option}" in shown.stdout for option in [*options.split(), "overwrite"])
