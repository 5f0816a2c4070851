"""Checkpoints of one rank with given weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_bipe.checkpoint.commit import begin, publish
from megatron_bipe.checkpoint.find import step_folder
from megatron_bipe.checkpoint.manifest import CheckpointInfo
from megatron_bipe.checkpoint.shard_files import Fragment, rank_file, write_fragments, write_index
from megatron_bipe.config.load import load_run_config


def write_checkpoint(run_dir: Path, step: int, weights: Mapping[str, Tensor]) -> Path:
    """Write `weights` as the newest checkpoint of the run folder, with the configuration in it, if there is one."""
    held = []
    for name, weight in weights.items():
        flat = weight.float().flatten()
        state = {"weight": flat, "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        held.append(Fragment(name, tuple(weight.shape), None, 0, state))
    publish_fragments(run_dir, step, [held])
    return step_folder(run_dir, step)


def publish_fragments(run_dir: Path, step: int, by_rank: Sequence[Sequence[Fragment]]) -> None:
    """Write the fragments of ranks as the newest checkpoint of the run folder."""
    folder = begin(run_dir, step, "test", 0)
    files = {rank_file(rank): write_fragments(folder, rank, held, {}) for rank, held in enumerate(by_rank)}
    config = run_dir / "config.yaml"
    write_index(folder, checkpoint_info(step, config if config.exists() else None), files)
    publish(folder, run_dir, step, files)


def checkpoint_info(step: int, path: Path | None = None) -> CheckpointInfo:
    """Return the checkpoint information of a run, with the configuration of `path`, or the default one."""
    return CheckpointInfo(step, step, {"ranks": 1}, load_run_config(path).model_dump(mode="json"), None, {})
