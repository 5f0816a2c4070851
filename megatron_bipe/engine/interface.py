"""The interface between the training loop and an engine; the loop does not depend on DeepSpeed otherwise."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from megatron_bipe.checkpoint.find import Checkpoint
from megatron_bipe.runtime.host_collectives import HostCollectives
from megatron_bipe.runtime.observer import Observer
from megatron_bipe.types import Batch


class StepResult(NamedTuple):
    """Result of one optimizer step; values may be tensors, so that only reading them waits for the device."""

    loss_nats: Tensor | float  # mean over the tokens of the global batch, before the update
    grad_norm: Tensor | float  # global L2 norm before clipping; if it is not finite, the update was skipped


class LossSums(NamedTuple):
    """Weighted sums of losses over all ranks, by equal part of the sequence; replicas count as often in both."""

    nats_Q: list[float]
    weights_Q: list[float]

    @property
    def mean_nats(self) -> float:
        """Mean loss per token: the same fp32 number however the losses are sharded, since the sums are fp64."""
        return float(np.float32(sum(self.nats_Q) / sum(self.weights_Q)))

    @property
    def nats_by_position(self) -> list[float]:
        """Mean loss of each part; NaN for one without weight."""
        pairs = zip(self.nats_Q, self.weights_Q, strict=True)
        return [float(np.float32(nats / weight)) if weight else math.nan for nats, weight in pairs]


class Engine(Protocol):
    """A model in training on all ranks of a launch; all ranks call each method together."""

    host: HostCollectives
    """Host-side (gloo) collectives over all ranks."""

    def train_step(self, micro_batches: Iterable[Batch[Tensor]], lr: float) -> StepResult:
        """Run forward and backward on this rank's micro-batches of one global batch, then update once.

        If the loss or gradient of any rank is not finite, all ranks skip the update.
        """

    def eval_loss(self, batches: Iterable[Batch[Tensor]]) -> LossSums:
        """Return the losses over the batches of all ranks, equally many on each and of one sequence length."""

    def latest_valid_checkpoint(self, run_dir: Path) -> Checkpoint | None:
        """Return the checkpoint that the run continues, verified byte by byte: its newest valid one.

        A run without checkpoints continues the one that `train.branch_from` names, whose `run_dir` is another; None
        without a branch.

        Raises:
            CheckpointError: on all ranks, if there are checkpoints but none is valid, or if that of the branch is not.
        """

    def save(
        self, run_dir: Path, step: int, *, loop_state: Mapping[str, Any] | None = None, final: bool = True
    ) -> None:
        """Write a checkpoint after `step` updates and make it the newest of the run.

        Args:
            run_dir: folder of the run.
            step: updates done.
            loop_state: JSON-serializable state that `load` returns; the same on all ranks.
            final: wait until the checkpoint is on the disk, and raise on failure. Otherwise a failure is logged as a
                warning, and with `checkpoint.asynchronous` training continues during the write.

        Raises:
            CheckpointError: on all ranks, if `final` and the checkpoint could not be written.
        """

    def finish_save(self) -> None:
        """Wait for a checkpoint that is being written in the background."""

    def load(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint of any layout and return its loop state.

        In the same layout a resume is bit-identical; on a GPU, with `train.deterministic`.
        """

    def observe(self, observer: Observer) -> None:
        """Tell `observer` of checkpoints and of progress.

        Each forward pass of this rank's part is progress, including that of a middle pipeline stage, and so are parts
        of the reading and writing of a checkpoint, while the training loop waits for them.
        """

    def pop_forward_seconds(self) -> float:
        """Return the seconds of this rank's forward passes since the last call, without waits for other stages."""

    def check_replicas(self, step: int) -> None:
        """Check after update `step` that replicated tensors are bit-identical on all ranks.

        Raises:
            DivergenceError: on all ranks, if any differ.
        """

    def close(self) -> None:
        """Finish a pending save and destroy the process group."""
