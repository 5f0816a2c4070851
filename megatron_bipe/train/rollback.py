"""From trouble back to the last checkpoint, past the samples that did harm.

All of it follows from losses, gradient norms and checkpoints, so that a run that is killed on the way and started again
comes to the same: the steps since the checkpoint are done again, are bad again, and lead back again.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from statistics import median_low

from megatron_bipe.config.schema import RunConfig
from megatron_bipe.engine.interface import Engine
from megatron_bipe.errors import HealthError
from megatron_bipe.train.anomaly_detector import AnomalyDetector, BadStep, Reading
from megatron_bipe.train.batch_loader import BatchLoader
from megatron_bipe.train.events import Events
from megatron_bipe.train.train_state import Samples, TrainState

_log = logging.getLogger(__name__)


class Rollback:
    """Judges the steps of a run on all ranks alike, and takes it back where they are bad.

    All ranks call each method together.

    Args:
        run: the run.
        engine: what is taken back.
        feed: names the windows of bad steps.
        events: where all of it is written down.
        progress: of the run as it starts here.
    """

    def __init__(self, run: RunConfig, engine: Engine, loader: BatchLoader, events: Events, state: TrainState) -> None:
        self._run, self._engine, self._feed, self._events = run, engine, loader, events
        self._host = engine.host
        self._detector = AnomalyDetector(run.health, state.good_losses)
        self._pass_over: list[Samples] = list(state.pass_over)
        self._returns: Counter[int] = Counter()  # by step of the checkpoint
        self._steps_compared = 0  # since ranks were compared last

    @property
    def good_losses(self) -> list[float]:
        """What `Progress` keeps of them."""
        return self._detector.good_losses

    @property
    def is_well(self) -> bool:
        """Whether the last step judged was good: only then is a checkpoint worth keeping."""
        return not self._detector.streak

    @property
    def is_needed(self) -> bool:
        """Whether there is trouble."""
        return self._detector.in_trouble

    def check_steps(self, readings: Sequence[Reading]) -> None:
        """Take the next steps, as the main rank read them."""
        for bad in self._detector.check_steps(self._host.broadcast_object(readings)):
            self._note(bad)
        self._steps_compared += len(readings)
        if 0 < self._run.health.compare_ranks_every <= self._steps_compared:
            self._name_slow_ranks(readings[-1].step)
            self._steps_compared = 0

    def can_go_back(self) -> bool:
        """Whether there is a checkpoint. Where there is none, that is said: the end is better kept than lost."""
        found = self._engine.latest_valid_checkpoint(self._run.run_dir) is not None
        if not found:
            last = self._detector.streak[-1]
            step = last.reading.step
            self._warn(f"step {step} | {last.reason} in the last step, and no checkpoint to return to: it is kept")
        return found

    def go_back(self) -> TrainState:
        """Load the newest checkpoint, and leave out the samples of the bad steps from now on.

        Raises:
            HealthError: there is no checkpoint, or the run has come back to it too often.
        """
        bad = self._detector.streak
        newest = self._engine.latest_valid_checkpoint(self._run.run_dir)
        if newest is None:
            raise self._hopeless("there is no checkpoint to return to")
        self._returns[newest.step] += 1
        if self._returns[newest.step] > self._run.health.max_returns:
            times = self._returns[newest.step] - 1
            raise self._hopeless(f"the run has returned to step {newest.step} {times} times before")
        state = TrainState.at(newest.step, self._run.train.global_batch, self._engine.load(newest.folder))
        self._pass_over += [step.reading.samples for step in bad]
        state.pass_over = [part for part in self._pass_over if part[1] > state.samples]
        passed_over = [bad[0].reading.samples[0], bad[-1].reading.samples[1]]
        self._events.add("return", step=bad[-1].reading.step, to_step=newest.step, samples=passed_over)
        self._warn(
            f"step {bad[-1].reading.step} | {len(bad)} bad steps in a row: back to step {newest.step}, "
            f"past samples {passed_over[0]} to {passed_over[1] - 1}"
        )
        self._detector = AnomalyDetector(self._run.health, state.good_losses)
        return state

    def _hopeless(self, why: str) -> HealthError:
        last = self._detector.streak[-1]
        return HealthError(
            f"{len(self._detector.streak)} bad steps in a row up to step {last.reading.step}: {last.reason}; {why}",
            remedy="Look at the samples that events.jsonl names; lower optimizer.lr, or lengthen the warm-up",
            location=self._run.run_dir,
        )

    def _note(self, bad: BadStep) -> None:
        step, (first, stop), loss, norm = bad.reading
        self._warn(f"step {step} | {bad.reason} | loss {loss:g} | grad {norm:g} | samples {first} to {stop - 1}")
        sequences = self._feed.sequences(first).tolist()
        facts = {"reason": bad.reason, "loss_nats": loss, "grad_norm": norm}
        self._events.add("bad step", step=step, samples=[first, stop], sequences=sequences, **facts)

    def _name_slow_ranks(self, step: int) -> None:
        own_s = self._host.all_gather_object(self._engine.pop_forward_seconds() + self._feed.reading_time_s())
        usual_s = median_low(own_s)
        for rank, name in enumerate(self._host.names):
            if own_s[rank] > self._run.health.slow_rank * usual_s:
                steps = self._steps_compared
                self._warn(
                    f"step {step} | {name} is slow: its own work of the last {steps} steps took {own_s[rank]:.3g} s, "
                    f"that of most ranks {usual_s:.3g} s"
                )
                facts = {"own_s": own_s[rank], "median_s": usual_s, "steps": steps}
                self._events.add("slow rank", step=step, rank=rank, name=name, **facts)

    def _warn(self, text: str) -> None:
        """Of what all ranks know one speaks."""
        if self._events.is_main:
            _log.warning(text)
