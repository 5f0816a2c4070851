"""The order of a step, visible in one function."""

from typing import NamedTuple

from megatron_bipe.config.schema import RunConfig
from megatron_bipe.engine.interface import Engine
from megatron_bipe.runtime.preemption import StopRequest
from megatron_bipe.runtime.watchdog import Watchdog
from megatron_bipe.train.batch_loader import BatchLoader
from megatron_bipe.train.metrics import Metrics
from megatron_bipe.train.profile import Profile
from megatron_bipe.train.rollback import Rollback
from megatron_bipe.train.schedule import learning_rate
from megatron_bipe.train.train_state import TrainState


class Parts(NamedTuple):
    """What the loop works with."""

    engine: Engine
    feed: BatchLoader
    metrics: Metrics
    watchdog: Watchdog
    recovery: Rollback
    stop_request: StopRequest
    profile: Profile


def train(run: RunConfig, parts: Parts, progress: TrainState, stop: int) -> TrainState:
    """Do updates up to `stop` of the run, or until a stop is asked for; the last one is followed by a checkpoint.

    Args:
        run: the run.
        parts: what it needs.
        progress: how far the run is; changed.
        stop: updates done at the end.

    Returns:
        How far the run then is.
    """
    engine, feed, metrics, watchdog, recovery, stop_request, profile = parts
    if progress.valid_owed:
        _validate(parts, progress)
    save_owed, stopping, first = False, stop_request.agreed(), progress.step + 1
    while progress.step < stop and not stopping:
        lr = learning_rate(run.optimizer, run.train.steps, progress.step)
        samples = progress.next_batch_range(run.train.global_batch)
        done = progress.step
        result = engine.train_step(watchdog.track_batches(f"step {done}", feed.train_batches(samples[0])), lr)
        metrics.step(done, samples, result, lr)
        profile.step_done()
        stopping = stop_request.agreed()
        if _due(done, run.train.check_replicas_every):
            engine.check_replicas(done)
        progress.valid_owed = feed.has_valid and (_due(done, run.train.valid_every) or done == run.train.steps)
        save_owed = save_owed or stopping or _due(done, run.train.save_every) or done == stop
        if not (done == first or _due(done, run.train.log_every) or progress.valid_owed or save_owed):
            continue
        recovery.check_steps(metrics.flush())  # waits for the device
        last_is_bad = done == stop and not recovery.is_well
        if recovery.is_needed or (last_is_bad and recovery.can_go_back()):
            progress, save_owed = recovery.go_back(), False
            metrics.go_back(progress)
            stopping = (progress.valid_owed and _validate(parts, progress)) or stopping
            continue
        if progress.valid_owed and not stopping:
            stopping = _validate(parts, progress)
            save_owed = save_owed or stopping
        if save_owed and (recovery.is_well or last_is_bad):
            progress.good_losses = recovery.good_losses
            metrics.sync()
            watchdog.mark(f"checkpoint of step {done}")
            is_last = stopping or done == stop
            engine.save(run.run_dir, done, loop_state=progress.model_dump(mode="json"), final=is_last)
            metrics.restart_clock()
            save_owed = False  # who asks meanwhile to stop is heard after the next step, whose checkpoint is the last
    return progress


def _validate(parts: Parts, progress: TrainState) -> bool:
    """The validation after the last step, which then is no longer owed; broken off, and True, on a request to stop."""
    batches = parts.stop_request.until(parts.feed.valid_batches())
    loss = parts.engine.eval_loss(parts.watchdog.track_batches(f"validation after step {progress.step}", batches))
    if not parts.stop_request.granted:
        progress.valid_owed = False
        parts.metrics.valid(progress.step, loss)
    return parts.stop_request.granted


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
