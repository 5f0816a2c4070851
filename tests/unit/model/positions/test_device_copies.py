"""Copies from host memory to the model's device, counted on the meta device: none in a block, one per table ever."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_bipe.config import ModelConfig
from megatron_bipe.config.encodings import ENCODINGS
from megatron_bipe.model.transformer import LocalLayers, build_model

TABLES = {"rope": 1, "xpos": 1, "alibi": 1}  # frequencies or slopes, by relative part


class DeviceCopies(TorchDispatchMode):
    """A count of the operations with tensors on two devices; scalars do not count."""

    def __init__(self):
        super().__init__()
        self.num_copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor) and x.ndim]
        self.num_copies += len({x.device.type for x in tensors}) > 1
        return result


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tables_are_copied_to_the_device_once_and_blocks_copy_nothing(encoding, recompute):
    config = ModelConfig(
        encoding=encoding, num_layers=3, hidden_size=32, num_heads=4, ffn_size=24, vocab_size=20, log_scale=True
    )
    counts = []
    model = build_model(config, 0, LocalLayers(), recompute).to("meta")
    for _ in range(2):
        ids = tuple(torch.zeros(2, 24, dtype=torch.int64, device="meta") for _ in range(3))
        with DeviceCopies() as seen:
            model(ids).sum().backward()
        counts.append(seen.num_copies)
    assert counts == [TABLES.get(config.parts.relative, 0), 0]
