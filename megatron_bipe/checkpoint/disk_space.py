"""Disk space of a run's checkpoints, estimated before the run starts."""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_bipe.checkpoint.commit import superseded
from megatron_bipe.checkpoint.find import branch_step, list_steps
from megatron_bipe.checkpoint.shard_files import KINDS
from megatron_bipe.config import RunConfig


class DiskPlan(NamedTuple):
    """Checkpoints that a run will write and keep, and the disk for them."""

    checkpoint_bytes: int
    num_existing: int
    num_kept: int
    """Checkpoints that exist at the end of the run."""
    num_peak: int
    """Most checkpoints that exist at once: an old one is deleted only after a new one is complete."""
    reserve_bytes: int
    free_bytes: int
    folder: Path
    """An existing folder on the disk."""
    deleted_next: list[int]
    """Steps of existing checkpoints that the next save deletes."""

    @property
    def next_bytes(self) -> int:
        """Free space that the next checkpoint needs."""
        return self.checkpoint_bytes + self.reserve_bytes

    @property
    def missing_bytes(self) -> int:
        """Space that the run will lack; 0 if everything fits."""
        num_new = max(0, self.num_peak - self.num_existing)
        return max(0, num_new * self.checkpoint_bytes + self.reserve_bytes - self.free_bytes) if num_new else 0

    def __str__(self) -> str:
        existing = f", and {self.num_existing:,} exist" if self.num_existing else ""
        kept = _size(self.num_kept * self.checkpoint_bytes)
        return (
            f"{_size(self.checkpoint_bytes)} each, {self.num_kept:,} kept at the end: {kept}{existing}; "
            f"{_size(self.free_bytes)} are free at {self.folder}"
        )

    def warnings(self) -> list[str]:
        """Return warnings of a disk that is too small, and of existing checkpoints that will be deleted."""
        found = []
        if self.missing_bytes:
            found.append(
                f"the disk of {self.folder} is too small for the checkpoints of the run: {self.num_peak:,} of "
                f"{_size(self.checkpoint_bytes)} exist at once, and {_size(self.missing_bytes)} are "
                "missing. Free space, keep fewer with checkpoint.keep_last and checkpoint.keep_every, or raise "
                "train.save_every"
            )
        if len(self.deleted_next) > 1:
            steps = ", ".join(map(str, self.deleted_next))
            found.append(
                f"the next save deletes {len(self.deleted_next)} checkpoints, those of steps {steps}, as "
                "checkpoint.keep_last and checkpoint.keep_every ask; set checkpoint.keep_last=0 to keep all"
            )
        return found


def plan_disk(run: RunConfig, num_parameters: int) -> DiskPlan:
    """Return the checkpoints of a run from its present state to its last step.

    Args:
        run: run configuration; its folder may or may not exist.
        num_parameters: parameters of the model.
    """
    existing, config = list_steps(run.run_dir), run.checkpoint
    newest, every, steps = max(existing, default=branch_step(run)), run.train.save_every, run.train.steps
    planned = [*range(newest + every - newest % every, steps, every)] if every else []
    planned += [steps] if steps > newest else []
    deleted = superseded([*existing, *planned], steps, config)
    num_kept = len(existing) + len(planned) - len(deleted)
    folder = run.run_dir.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return DiskPlan(
        checkpoint_bytes=num_parameters * len(KINDS) * torch.float32.itemsize,
        num_existing=len(existing),
        num_kept=num_kept,
        num_peak=num_kept + bool(planned and deleted),
        reserve_bytes=int(config.min_free_gib * 2**30),
        free_bytes=shutil.disk_usage(folder).free,
        folder=folder,
        deleted_next=superseded([*existing, *planned[:1]], planned[0], config) if planned else [],
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
