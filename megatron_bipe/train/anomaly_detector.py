"""Whether training goes well: losses and gradient norms that are not finite, and losses that jump.

A step whose loss or gradient is not finite updates nothing, on no rank; the engine sees to that. A spike is a loss far
above the last good ones, in their standard deviations; that update has been made. Both are bad steps, and so many of
them in a row are trouble: then the run goes back to its last checkpoint, and passes their samples over.
"""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from megatron_bipe.config.schema import HealthConfig
from megatron_bipe.train.train_state import Samples

_LEAST_DEVIATION = 1e-3  # of the mean: losses that hardly vary make no spike of a small step


class Reading(NamedTuple):
    """What is known of a step once the device has come so far; the same on all ranks."""

    step: int  # from 1
    samples: Samples
    loss_nats: float
    grad_norm: float


class BadStep(NamedTuple):
    """A step that did not go well."""

    reading: Reading
    reason: str


class AnomalyDetector:
    """Judges the steps of a run in their order.

    Args:
        config: what is bad, and how much of it is trouble.
        good_losses: of the last good steps, in order; kept up to date.
    """

    def __init__(self, config: HealthConfig, good_losses: Iterable[float] = ()) -> None:
        self._config = config
        self.good_losses = list(good_losses)
        self.streak: list[BadStep] = []  # bad steps up to the last one seen, without a good one among them

    def check_steps(self, readings: Iterable[Reading]) -> list[BadStep]:
        """Take the next steps; those among them that are bad. Stops at trouble, for what follows will not last."""
        found = []
        for reading in readings:
            reason = self._reason(reading)
            if reason:
                found.append(BadStep(reading, reason))
                self.streak.append(found[-1])
                if self.in_trouble:
                    break
            else:
                self.streak.clear()
                self.good_losses = [*self.good_losses, reading.loss_nats][-self._config.spike_window :]
        return found

    @property
    def in_trouble(self) -> bool:
        """Whether so many steps in a row were bad that the run must go back."""
        return len(self.streak) >= self._config.patience

    def _reason(self, reading: Reading) -> str:
        if not (math.isfinite(reading.loss_nats) and math.isfinite(reading.grad_norm)):
            return "the loss or the gradient is not finite; nothing was updated"
        score = self._score(reading.loss_nats)
        limit = self._config.spike_deviations
        return f"the loss is {score:.1f} standard deviations above the last good ones" if 0 < limit < score else ""

    def _score(self, loss: float) -> float:
        """Standard deviations above the mean of the window; 0 until it is full."""
        if len(self.good_losses) < self._config.spike_window:
            return 0.0
        mean = statistics.fmean(self.good_losses)
        return (loss - mean) / max(statistics.stdev(self.good_losses), abs(mean) * _LEAST_DEVIATION)
