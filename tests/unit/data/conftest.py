"""A dataset for tests of inspection."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bipe.data.manifest import Manifest
from tests.helpers.datasets import FEW_TEXTS


@pytest.fixture
def folder(write_text_dataset: Callable[..., Manifest], tmp_path: Path) -> Path:
    write_text_dataset(tmp_path, FEW_TEXTS)
    return tmp_path
