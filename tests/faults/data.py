"""The datasets of these runs."""

from pathlib import Path

from tests.conftest import _write_text_dataset

WORDS = ("hello world", "a text of some length", "one more sentence", "and then another")


def make_data(folder: Path) -> Path:
    """Folders train and valid, of different texts."""
    for name, first in (("train", 0), ("valid", 200)):
        texts = [
            ". ".join(f"{WORDS[(number * place + place) % len(WORDS)]} number {number}" for place in range(40))
            for number in range(first, first + 20)
        ]
        _write_text_dataset(folder / name, [texts])
    return folder
