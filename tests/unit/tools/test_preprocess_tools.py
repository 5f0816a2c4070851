"""The commands that make tokenizers and datasets, one after the other."""

import json
from pathlib import Path

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.errors import DataError
from tests.helpers.tools import assert_refuses, call_tool


def test_train_then_preprocess_then_refuse_to_overwrite(tmp_path: Path) -> None:
    file, tokenizer, output = (tmp_path / name for name in ("in.jsonl", "tok", "out"))
    file.write_text("".join(json.dumps({"body": f"{n} words , and a stop .\n"}) + "\n" for n in range(200)) + "bad\n")
    text = ("--input", file, "--text-key", "body")
    assert (
        f"{tokenizer}: 285 tokens"
        in call_tool("train_tokenizer", *text, "--vocab-size", 285, "--output", tokenizer).output
    )
    command = (*text, "--tokenizer", tokenizer, "--output", output)
    made = call_tool("preprocess", *command, "--workers", 2, "--segments", "newline").output
    assert "200 documents" in made
    assert f"{file}, line 201" in made
    assert "MB/s" in made
    assert TokenDataset(output).manifest.num_documents == 200
    assert_refuses("preprocess", command, DataError, "--overwrite", location=output)
    too_large = (*text, "--vocab-size", 9999, "--output", tmp_path / "x")
    assert_refuses("train_tokenizer", too_large, DataError, 9999)


def test_preprocess_help_names_every_option() -> None:
    shown = call_tool("preprocess", "--help").output
    options = "input tokenizer output segments workers partition-by shard-tokens text-key special-in-text max-malformed"
    assert all(f"--{option}" in shown for option in [*options.split(), "overwrite"])
