"""What the training loop may ask of an engine; the loop knows nothing else of DeepSpeed."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from megatron_bipe.checkpoint.find import Checkpoint
from megatron_bipe.runtime.host_collectives import HostCollectives
from megatron_bipe.types import Batch


class StepResult(NamedTuple):
    """Outcome of one optimizer step; tensors, so that nothing waits for the device until someone looks."""

    loss_nats: Tensor | float  # mean over the tokens of the global batch, before the update
    grad_norm: Tensor | float  # global L2 norm before clipping; not finite: nothing was updated


class Engine(Protocol):
    """One model under training on all ranks of a launch; every rank calls each method together."""

    host: HostCollectives
    """Of the hosts of its ranks."""

    def train_step(self, micro_batches: Iterable[Batch[Tensor]], lr: float) -> StepResult:
        """Run this rank's micro-batches of one global batch forward and backward, then update once.

        Where the loss or the gradient of any rank is not finite, no rank updates anything.
        """

    def eval_loss(self, batches: Iterable[Batch[Tensor]]) -> float:
        """Mean loss in nats a token over the batches of all ranks; each rank gives its own, equally many."""

    def latest_valid_checkpoint(self, run_dir: Path) -> Checkpoint | None:
        """The newest checkpoint of this run that is whole, every byte looked at; None if there is none at all.

        Raises:
            CheckpointError: on all ranks, if none is whole.
        """

    def save(
        self, run_dir: Path, step: int, *, loop_state: Mapping[str, Any] | None = None, final: bool = True
    ) -> None:
        """Write a checkpoint after `step` updates and point the run folder at it.

        Args:
            run_dir: of the run.
            step: updates done.
            loop_state: what `load` is to give back, as JSON holds it; the same on all ranks.
            final: nothing comes after it: wait until it is on the disk, and raise what went wrong. Otherwise that is a
                warning, and with `checkpoint.asynchronous` training may go on meanwhile.

        Raises:
            CheckpointError: on all ranks, where `final`: it could not be written.
        """

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from a checkpoint of any layout; from one of the same layout bit for bit. Returns its loop state."""

    def on_forward(self, to: Callable[[], None]) -> None:
        """Call `to` at each forward pass of this rank's part: of a stage between others no one else hears."""

    def pop_forward_seconds(self) -> float:
        """Seconds of this rank's own forward passes since the last call: without what it waits for other stages."""

    def check_replicas(self, step: int) -> None:
        """Compare the bits of what several ranks hold alike, after update `step`.

        Raises:
            DivergenceError: on all ranks, if any differ.
        """

    def close(self) -> None:
        """Leave the process group."""
