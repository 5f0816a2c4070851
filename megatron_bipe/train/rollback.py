"""Detection of bad steps, and rollback to the last checkpoint after several of them, skipping their samples.

A step whose loss or gradient is not finite updates nothing on any rank; the engine ensures that. A spike is a loss far
above the last good losses, in units of their standard deviation; its update has been made. Both are bad steps. After
`patience` bad steps in a row, the run rolls back to its last checkpoint and skips their samples.

Decisions depend only on losses, gradient norms and checkpoints. A run that is killed meanwhile and resumed therefore
comes to the same state: it repeats the steps since the checkpoint, which are bad again and cause the same rollback.
"""

import logging
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median_low
from typing import NamedTuple

from megatron_bipe.config import HealthConfig, RunConfig
from megatron_bipe.engine.interface import Engine
from megatron_bipe.errors import HealthError
from megatron_bipe.train.metrics_file import BAD_STEP, RETURN, SLOW_RANK, Events
from megatron_bipe.train.read_ahead import Loader
from megatron_bipe.train.train_state import Samples, TrainState

_log = logging.getLogger(__name__)


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


class Rollback:
    """Anomaly check of all steps on all ranks together, and rollback of the run if they are bad.

    All ranks call each method together.

    Args:
        run: the run configuration.
        engine: loads the checkpoint.
        loader: identifies the sequences of bad steps.
        events: event log.
        state: training state at the start.
    """

    def __init__(self, run: RunConfig, engine: Engine, loader: Loader, events: Events, state: TrainState) -> None:
        self._run, self._engine, self._loader, self._events = run, engine, loader, events
        self._host = engine.host
        self._detector = AnomalyDetector(run.health, state.good_losses)
        self._skipped: list[Samples] = list(state.pass_over)
        self._returns: Counter[int] = Counter()  # by step of the checkpoint
        self._steps_compared = 0  # since the last comparison of ranks

    @property
    def good_losses(self) -> list[float]:
        """Losses of the last good steps, for `TrainState.good_losses`."""
        return self._detector.good_losses

    @property
    def last_step_is_good(self) -> bool:
        """True if the last checked step was good, so that a checkpoint is worth keeping."""
        return not self._detector.bad_steps

    @property
    def is_needed(self) -> bool:
        return self._detector.needs_rollback

    def check_steps(self, readings: Sequence[Reading]) -> None:
        """Check the next steps, with the readings of the main rank."""
        received = [
            Reading(step, (first, stop), *rest) for step, (first, stop), *rest in self._host.broadcast_object(readings)
        ]
        for bad in self._detector.check_steps(received):
            self._report(bad)
        self._steps_compared += len(readings)
        if 0 < self._run.health.compare_ranks_every <= self._steps_compared:
            self._report_slow_ranks(readings[-1].step)
            self._steps_compared = 0

    def has_checkpoint(self) -> bool:
        """Return True if there is a checkpoint; if there is none, warn that the bad last step is kept."""
        found = self._engine.latest_valid_checkpoint(self._run.run_dir) is not None
        if not found:
            last = self._detector.bad_steps[-1]
            step = last.reading.step
            self._warn(f"step {step} | {last.reason} in the last step, and there is no checkpoint to load: it is kept")
        return found

    def load_last_checkpoint(self) -> TrainState:
        """Load the newest checkpoint, and skip the samples of the bad steps from now on.

        Raises:
            HealthError: there is no checkpoint, or the run has returned to it too often.
        """
        bad = self._detector.bad_steps
        newest = self._engine.latest_valid_checkpoint(self._run.run_dir)
        if newest is None:
            raise self._error("there is no checkpoint to roll back to")
        self._returns[newest.step] += 1
        if self._returns[newest.step] > self._run.health.max_returns:
            times = self._returns[newest.step] - 1
            raise self._error(f"the run has returned to step {newest.step} {times} times before")
        state = TrainState.at(newest.step, self._run.train.global_batch, self._engine.load(newest.folder))
        # An earlier checkpoint than the one at the start may list samples that had been passed by then.
        self._skipped = sorted({*self._skipped, *state.pass_over, *(step.reading.samples for step in bad)})
        state.pass_over = [part for part in self._skipped if part[1] > state.samples]
        skipped = [bad[0].reading.samples[0], bad[-1].reading.samples[1]]
        self._events.add(RETURN, step=bad[-1].reading.step, to_step=newest.step, samples=skipped)
        self._warn(
            f"step {bad[-1].reading.step} | {len(bad)} bad steps in a row: rolled back to step {newest.step}, "
            f"skipping samples {skipped[0]} to {skipped[1] - 1}"
        )
        self._detector = AnomalyDetector(self._run.health, state.good_losses)
        return state

    def _error(self, why: str) -> HealthError:
        last = self._detector.bad_steps[-1]
        return HealthError(
            f"{len(self._detector.bad_steps)} bad steps in a row up to step {last.reading.step}: {last.reason}; {why}",
            remedy="Inspect the samples that events.jsonl lists; lower optimizer.lr, or lengthen the warm-up",
            location=self._run.run_dir,
        )

    def _report(self, bad: BadStep) -> None:
        step, (first, stop), loss, norm = bad.reading
        self._warn(f"step {step} | {bad.reason} | loss {loss:g} | grad {norm:g} | samples {first} to {stop - 1}")
        sequences = self._loader.sequences(first).tolist()
        facts = {"reason": bad.reason, "loss_nats": loss, "grad_norm": norm}
        self._events.add(BAD_STEP, step=step, samples=[first, stop], windows=sequences, **facts)

    def _report_slow_ranks(self, step: int) -> None:
        own_s = self._host.all_gather_object(self._engine.pop_forward_seconds() + self._loader.reading_time_s())
        median_s = median_low(own_s)
        for rank, name in enumerate(self._host.names):
            if own_s[rank] > self._run.health.slow_rank * median_s:
                steps = self._steps_compared
                self._warn(
                    f"step {step} | {name} is slow: its compute time of the last {steps} steps is {own_s[rank]:.3g} s, "
                    f"the median of all ranks is {median_s:.3g} s"
                )
                facts = {"own_s": own_s[rank], "median_s": median_s, "steps": steps}
                self._events.add(SLOW_RANK, step=step, rank=rank, name=name, **facts)

    def _warn(self, text: str) -> None:
        """Log a warning on the main rank only."""
        if self._events.is_main:
            _log.warning(text)
