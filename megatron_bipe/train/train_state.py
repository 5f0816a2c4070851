"""Training state of the loop that a checkpoint stores in addition to model and optimizer.

The order of samples is fixed, so the number of consumed samples determines all later batches. It is counted separately
from the steps, because samples that caused bad steps are skipped.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

Samples = tuple[int, int]  # first, and last + 1


class TrainState(BaseModel):
    """Progress of a run, as stored in a checkpoint."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    step: int = 0
    """Updates done, including those skipped because of a gradient that was not finite."""
    samples: int = 0
    """Samples consumed or skipped: index of the next one in the order."""
    pass_over: list[Samples] = []
    """Later samples that will be skipped."""
    valid_owed: bool = False
    """True if the validation after `step` is pending, because the run was stopped before or in it."""
    good_losses: list[float] = []
    """Losses of the last good steps, for the detection of spikes."""

    @classmethod
    def at(cls, step: int, global_batch: int, loop_state: Mapping[str, Any]) -> "TrainState":
        """Return the state of a checkpoint of `step`; an empty `loop_state` means that no samples were skipped."""
        return cls.model_validate(loop_state or {"step": step, "samples": step * global_batch})

    def next_batch_range(self, global_batch: int) -> Samples:
        """Advance to the next step and return its samples."""
        while covering := [stop for first, stop in self.pass_over if first <= self.samples < stop]:
            self.samples = max(covering)
        self.pass_over = [part for part in self.pass_over if part[1] > self.samples]
        first = self.samples
        self.step, self.samples = self.step + 1, first + global_batch
        return first, self.samples
