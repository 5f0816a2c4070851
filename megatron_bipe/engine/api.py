"""What the training loop may ask of an engine; the loop knows nothing else of DeepSpeed."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_bipe.engine.checkpoint import Checkpoint
from megatron_bipe.types import Batch


class StepResult(NamedTuple):
    """Outcome of one optimizer step; tensors, so that nothing waits for the device until someone looks."""

    loss_nats: Tensor | float  # mean over the tokens of the global batch, before the update
    grad_norm: Tensor | float  # global L2 norm before clipping


class Engine(Protocol):
    """One model under training on all ranks of a launch; every rank calls each method together."""

    def train_step(self, micro_batches: Iterable[Batch[Tensor]], lr: float) -> StepResult:
        """Run this rank's micro-batches of one global batch forward and backward, then update once."""

    def eval_loss(self, batches: Iterable[Batch[Tensor]]) -> float:
        """Mean loss in nats a token over the batches of all ranks; each rank gives its own, equally many."""

    def save(self, run_dir: Path, step: int, *, final: bool = True) -> None:
        """Write a checkpoint after `step` updates and point the run folder at it.

        Args:
            run_dir: of the run.
            step: updates done.
            final: nothing comes after it: wait until it is on the disk, and raise what went wrong. Otherwise that is a
                warning, and with `checkpoint.asynchronous` training may go on meanwhile.

        Raises:
            CheckpointError: on all ranks, where `final`: it could not be written.
        """

    def newest_good(self, run_dir: Path) -> Checkpoint | None:
        """The newest checkpoint of this run that is whole, every byte looked at; None if there is none at all.

        Raises:
            CheckpointError: on all ranks, if none is whole.
        """

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint of any layout; from one of the same layout bit for bit."""

    def check_replicas(self, step: int) -> None:
        """Compare the bits of what several ranks hold alike, after update `step`.

        Raises:
            DivergenceError: on all ranks, if any differ.
        """

    def close(self) -> None:
        """Leave the process group."""
