"""A checkpoint as one rank would have written it, out of weights that no run has made."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_bipe.engine.checkpoint import publish
from megatron_bipe.engine.state_files import Fragment, write_fragments, write_index


def write_checkpoint(run_dir: Path, step: int, weights: Mapping[str, Tensor]) -> Path:
    """Put `weights` into the run folder as its newest checkpoint."""
    held = []
    for name, weight in weights.items():
        flat = weight.float().flatten()
        state = {"weight": flat, "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        held.append(Fragment(name, tuple(weight.shape), None, 0, state))
    return publish(
        run_dir,
        step,
        lambda folder: write_fragments(folder, 0, held),
        lambda folder: write_index(folder, step, step, {"ranks": 1}),
        True,
        lambda: None,
    )
