"""The dataset that tests of looking at datasets share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bipe.data.manifest import Manifest

TEXTS = [["a cat\nsat.\n", "x\n\ny"], [], ["\u4e16\x1bz q\n", ""]]


@pytest.fixture
def folder(write_text_dataset: Callable[..., Manifest], tmp_path: Path) -> Path:
    write_text_dataset(tmp_path, TEXTS)
    return tmp_path
