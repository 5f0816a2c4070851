"""How far the run is: what a checkpoint keeps for the loop, beside the training state.

The order of samples is fixed, so that the number of samples consumed says all that is to come. Steps and samples go
together, batch by batch, until samples that did harm are passed over; so both are counted.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

Samples = tuple[int, int]  # the first, and the one after the last


class TrainState(BaseModel):
    """Counts of the run."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    step: int = 0
    """Updates done, those left out for a gradient that was not finite included."""
    samples: int = 0
    """Samples consumed or passed over: the next one's number in the order."""
    pass_over: list[Samples] = []
    """Samples ahead that are not to be read."""
    valid_owed: bool = False
    """Whether the validation after `step` is still to be done: the run was stopped before or in it."""
    good_losses: list[float] = []
    """Losses of the last good steps, by which a spike is told."""

    @classmethod
    def at(cls, step: int, global_batch: int, loop_state: Mapping[str, Any]) -> "TrainState":
        """As a checkpoint of `step` has it; one that says nothing is from a run that passed nothing over."""
        return cls.model_validate(loop_state or {"step": step, "samples": step * global_batch})

    def next_batch_range(self, global_batch: int) -> Samples:
        """Begin a step: its samples."""
        while covering := [stop for first, stop in self.pass_over if first <= self.samples < stop]:
            self.samples = max(covering)
        self.pass_over = [part for part in self.pass_over if part[1] > self.samples]
        first = self.samples
        self.step, self.samples = self.step + 1, first + global_batch
        return first, self.samples
