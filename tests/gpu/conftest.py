"""The device of these tests: the GPU with `BIPE_DEVICE=cuda`; the CPU, at toy size, with `GPU_TESTS_ON_CPU=1`."""

import os
from pathlib import Path

import pytest
import torch

from megatron_bipe.runtime.environment import DEVICE
from megatron_bipe.runtime.hardware import device_type

ON_CPU = os.environ.get("GPU_TESTS_ON_CPU") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder if no device was chosen for them."""
    has_device = ON_CPU or os.environ.get(DEVICE) == "cuda"
    for item in items:
        if Path(__file__).parent in item.path.parents and not has_device:
            item.add_marker(pytest.mark.skip(reason="needs a GPU and BIPE_DEVICE=cuda, or GPU_TESTS_ON_CPU=1"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device; `BIPE_DEVICE=cuda` without a GPU is an error."""
    return torch.device("cpu" if ON_CPU else device_type())
