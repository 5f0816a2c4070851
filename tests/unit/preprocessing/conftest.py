"""A small tokenizer and the same documents in every input format."""

import gzip
import json
from pathlib import Path

import orjson
import pytest
import zstandard

from preprocessing.train_tokenizer import TrainOptions, train_tokenizer

TEXTS = [
    "The first document.\nIt has two lines . And a stop after a space .\n",
    "  leading spaces,\ttabs,\r\nCR LF and    runs of spaces  ",
    "a <s> b</s>\n<s>\n<unk><s>",
    "e\u0301 \u4e2d\u6587 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \U0001f469\u200d\U0001f680 \x00 \ufeff\n\n\n",
    "x",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.jsonl"
    words = "the quick brown fox jumps over the lazy dog . and the document has two lines of plain words ."
    text.write_text("".join(json.dumps({"text": f"{words} {words[n:]}\n  {words[:n]}"}) + "\n" for n in range(40)))
    return train_tokenizer(TrainOptions([str(text)], vocab_size=340, output=folder / "made"))


@pytest.fixture
def texts() -> list[str]:
    return list(TEXTS)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """The same documents as .jsonl, .jsonl.zst (two frames), .jsonl.gz and a folder of .txt."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    names = ("Gutenberg (PG-19)", "ArXiv")
    lines = [
        orjson.dumps({"text": text, "meta": {"pile_set_name": names[n % 2]}}) + b"\n" for n, text in enumerate(TEXTS)
    ]
    (folder / "a.jsonl").write_bytes(b"".join(lines))
    frames = [zstandard.compress(b"".join(part)) for part in (lines[:2], lines[2:])]
    (folder / "b.jsonl.zst").write_bytes(b"".join(frames))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    (folder / "d").mkdir()
    for n, text in enumerate(TEXTS):
        (folder / "d" / f"{n}.txt").write_bytes(text.encode())
    return {
        "jsonl": folder / "a.jsonl",
        "zst": folder / "b.jsonl.zst",
        "gz": folder / "c.jsonl.gz",
        "txt": folder / "d",
    }
