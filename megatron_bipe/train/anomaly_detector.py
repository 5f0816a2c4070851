"""Detection of training anomalies: losses and gradient norms that are not finite, and loss spikes.

A step whose loss or gradient is not finite updates nothing on any rank; the engine ensures that. A spike is a loss far
above the last good losses, in units of their standard deviation; its update has been made. Both are bad steps. After
`patience` bad steps in a row, the run rolls back to its last checkpoint and skips their samples.
"""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from megatron_bipe.config.schema import HealthConfig
from megatron_bipe.train.train_state import Samples

_MIN_DEVIATION = 1e-3  # as a fraction of the mean: small changes of nearly constant losses are not spikes


class Reading(NamedTuple):
    """The result of a step, read from the device; the same on all ranks."""

    step: int  # from 1
    samples: Samples
    loss_nats: float
    grad_norm: float


class BadStep(NamedTuple):
    """A bad step and the reason."""

    reading: Reading
    reason: str


class AnomalyDetector:
    """Anomaly detection over consecutive steps of a run.

    Args:
        config: thresholds of bad steps and of rollback.
        good_losses: losses of the last good steps, in order; kept up to date.
    """

    def __init__(self, config: HealthConfig, good_losses: Iterable[float] = ()) -> None:
        self._config = config
        self.good_losses = list(good_losses)
        self.bad_steps: list[BadStep] = []  # bad steps in a row, up to the last step checked

    def check_steps(self, readings: Iterable[Reading]) -> list[BadStep]:
        """Check the next steps and return the bad ones; stop if a rollback is needed, which discards later steps."""
        found = []
        for reading in readings:
            reason = self._reason(reading)
            if reason:
                found.append(BadStep(reading, reason))
                self.bad_steps.append(found[-1])
                if self.needs_rollback:
                    break
            else:
                self.bad_steps.clear()
                self.good_losses = [*self.good_losses, reading.loss_nats][-self._config.spike_window :]
        return found

    @property
    def needs_rollback(self) -> bool:
        """True if there are so many bad steps in a row that the run must roll back."""
        return len(self.bad_steps) >= self._config.patience

    def _reason(self, reading: Reading) -> str:
        if not (math.isfinite(reading.loss_nats) and math.isfinite(reading.grad_norm)):
            return "the loss or the gradient is not finite; nothing was updated"
        score = self._score(reading.loss_nats)
        limit = self._config.spike_deviations
        return f"the loss is {score:.1f} standard deviations above the last good ones" if 0 < limit < score else ""

    def _score(self, loss: float) -> float:
        """Return the standard deviations above the mean of the good losses; 0 until there are enough of them."""
        if len(self.good_losses) < self._config.spike_window:
            return 0.0
        mean = statistics.fmean(self.good_losses)
        return (loss - mean) / max(statistics.stdev(self.good_losses), abs(mean) * _MIN_DEVIATION)
