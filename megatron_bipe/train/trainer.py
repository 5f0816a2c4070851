"""The training loop: resume from the newest valid checkpoint and train; `Trainer.train` shows the order of one step."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_bipe.checkpoint.manifest import fingerprint_of
from megatron_bipe.config import RunConfig
from megatron_bipe.engine.interface import Engine
from megatron_bipe.parallel import Mesh
from megatron_bipe.run_files import DONE, START, STOP, first_start_s, read_events
from megatron_bipe.runtime.exit_handling import rank_name, write_stderr
from megatron_bipe.runtime.hardware import DTYPES, keep_freed_memory, peak_flops
from megatron_bipe.runtime.preemption import StopRequest
from megatron_bipe.runtime.watchdog import Watchdog
from megatron_bipe.train.after_save import AfterSave
from megatron_bipe.train.alerts import Alerts, webhook_of
from megatron_bipe.train.metrics import Metrics
from megatron_bipe.train.metrics_file import AFTER_SAVE_FAILED, TRACKER_FAILED, VALIDATION, Events, RunObserver
from megatron_bipe.train.profile import Profile
from megatron_bipe.train.read_ahead import Loader
from megatron_bipe.train.rollback import Rollback
from megatron_bipe.train.schedule import learning_rate
from megatron_bipe.train.trackers import open_trackers
from megatron_bipe.train.train_state import TrainState
from megatron_bipe.train.validation import main_result

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainer:
    """Trainer of one run; all ranks create this object and call its methods together.

    Args:
        config: run configuration; the run folder exists.
        mesh: this rank's coordinates.
        engine: engine that was started for this run.
        loader: source of training and validation batches.
        watchdog: watchdog that the caller has entered.
        stop_request: requests to stop the run; `run` makes all ranks agree on them.
        profile: profiler of the configured steps.
        provenance: further keys of the `start` event, from `train.provenance.describe_start`.
    """

    config: RunConfig
    mesh: Mesh
    engine: Engine
    loader: Loader
    watchdog: Watchdog
    stop_request: StopRequest
    profile: Profile
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def alerts(self) -> Alerts:
        return Alerts(webhook_of(self.config) if self.mesh.is_main else None, self.config.run_dir)

    @cached_property
    def events(self) -> Events:
        return Events(self.config.run_dir, self.mesh.is_main, self.alerts.add)

    @cached_property
    def after_save(self) -> AfterSave | None:
        command = self.config.checkpoint.after_save
        if command is None or not self.mesh.is_main:
            return None
        events = self.events
        return AfterSave(
            command, self.config.run_dir, lambda step, why: events.add(AFTER_SAVE_FAILED, step=step, reason=why)
        )

    def run(self, stop_step: int) -> bool:
        """Load the newest valid checkpoint, if there is one, and train until `stop_step` updates are done.

        Returns:
            True if the run has reached `stop_step`, False if it was preempted. A run that is already beyond `stop_step`
            is not trained.
        """
        config, mesh, engine, events = self.config, self.mesh, self.engine, self.events
        engine.observe(RunObserver(events, self.watchdog.heartbeat, self.after_save))
        state, origin = self._load_state()
        if state.step > stop_step:
            _log.info("the run is already at step %d, beyond the requested %d", state.step, stop_step)
        keep_freed_memory(mesh.device)  # start-up and loading have already returned their memory
        self.stop_request.agree_by(engine.host.any_rank)
        events.add(START, step=state.step, ranks=mesh.num_ranks, **origin, **self.provenance)
        metrics = self._open_metrics(state)
        rollback = Rollback(config, engine, self.loader, events, state)
        state = self.train(state, metrics, rollback, stop_step)
        self.profile.close()
        metrics.close()
        engine.finish_save()  # its event and its after_save command belong to this launch
        finished = state.step >= stop_step and not (self.stop_request.is_agreed and state.valid_owed)
        goodput = metrics.goodput() if mesh.is_main else None
        events.add(DONE if finished else STOP, step=state.step, goodput=goodput)
        if self.stop_request.reason and not finished:
            reason = f"{self.stop_request.reason}, after step {state.step}; the same command resumes the run"
            write_stderr(f"{rank_name(mesh)}: {reason}")
        if self.after_save is not None:
            self.after_save.close(config.parallel.timeout_s, self.watchdog.heartbeat)
        self.alerts.close()
        return finished

    def _open_metrics(self, state: TrainState) -> Metrics:
        """Open the metrics of a start of the run, whose event is recorded, and its trackers."""
        config, mesh, events = self.config, self.mesh, self.events
        began_at_s = first_start_s(read_events(config.run_dir)) if mesh.is_main else None
        metrics = Metrics(config, mesh, state, peak_flops(mesh.device, DTYPES[config.train.precision]), began_at_s)
        if mesh.is_main:
            trackers = open_trackers(config, lambda name, why: events.add(TRACKER_FAILED, tracker=name, reason=why))
            for tracker in trackers:
                metrics.attach(tracker)
        return metrics

    def train(self, state: TrainState, metrics: Metrics, rollback: Rollback, stop_step: int) -> TrainState:
        """Make updates until `stop_step` are done or a stop is requested, and save a checkpoint after the last one.

        Args:
            state: training state at the start; modified.
            metrics: receives every step.
            rollback: checks the steps, and loads a checkpoint after several bad ones in a row.
            stop_step: total number of updates of the run at which to stop.

        Returns:
            The training state at the end.
        """
        engine, loader, stop_request = self.engine, self.loader, self.stop_request
        optimizer, settings = self.config.optimizer, self.config.train
        if state.valid_owed:
            self._validate(state, metrics)
        save_pending, stopping, first = False, stop_request.poll(), state.step + 1
        while state.step < stop_step and not stopping:
            lr = learning_rate(optimizer, settings.steps, state.step)
            samples = state.next_batch_range(settings.global_batch)
            step = state.step
            batches = self.watchdog.track_batches(f"step {step}", loader.train_batches(samples[0]))
            metrics.step(step, samples, engine.train_step(batches, lr), lr)
            self.profile.step_done()
            stopping = stop_request.poll()
            if _is_due(step, settings.check_replicas_every):
                engine.check_replicas(step)
            state.valid_owed = loader.has_valid and (_is_due(step, settings.valid_every) or step == settings.steps)
            save_pending = save_pending or stopping or _is_due(step, settings.save_every) or step == stop_step
            if not (step == first or _is_due(step, settings.log_every) or state.valid_owed or save_pending):
                continue
            rollback.check_steps(metrics.flush())  # waits for the device
            last_is_bad = step == stop_step and not rollback.last_step_is_good
            if rollback.is_needed or (last_is_bad and rollback.has_checkpoint()):
                state, save_pending = rollback.load_last_checkpoint(), False
                metrics.drop_after(state)
                stopping = (state.valid_owed and self._validate(state, metrics)) or stopping
                continue
            if state.valid_owed and not stopping:
                stopping = self._validate(state, metrics)
                save_pending = save_pending or stopping
            if save_pending and (rollback.last_step_is_good or last_is_bad):
                state.good_losses = rollback.good_losses
                metrics.sync()
                self.watchdog.mark(f"checkpoint of step {step}")
                is_last = stopping or step == stop_step
                engine.save(self.config.run_dir, step, loop_state=state.model_dump(mode="json"), final=is_last)
                metrics.restart_clock()
                save_pending = False  # a stop requested during the save is seen after the next step, and saved again
        return state

    def _load_state(self) -> tuple[TrainState, dict[str, Any]]:
        """Load the checkpoint that the run continues; return its state, and the origin of a branch that begins."""
        self.watchdog.mark("the choice of a checkpoint")
        checkpoint = self.engine.latest_valid_checkpoint(self.config.run_dir)
        if checkpoint is None:
            return TrainState(), {}
        self.watchdog.mark(f"loading step {checkpoint.step}")
        loop_state = self.engine.load(checkpoint.folder)
        state = TrainState.at(checkpoint.step, self.config.train.global_batch, loop_state)
        _log.info("continuing %s from step %d", checkpoint.run_dir, state.step)
        if checkpoint.run_dir == self.config.run_dir:
            return state, {}
        fingerprint = fingerprint_of(checkpoint.folder)
        run = str(checkpoint.run_dir)
        return state, {"branch_from": {"run": run, "step": checkpoint.step, "fingerprint": fingerprint}}

    def _validate(self, state: TrainState, metrics: Metrics) -> bool:
        """Run the pending validations; if a stop is requested meanwhile, return True and keep all of them pending."""
        if not self.loader.has_valid:  # pending since a start with other settings
            state.valid_owed = False
            return False
        results = []
        for validation in self.loader.validations:
            location = f"validation after step {state.step} on {validation.name} at {validation.length_tokens} tokens"
            batches = self.stop_request.until(self.loader.valid_batches(validation))
            sums = self.engine.eval_loss(self.watchdog.track_batches(location, batches))
            if self.stop_request.is_agreed:
                return True
            results.append(validation.result(sums))
        state.valid_owed = False
        metrics.valid(state.step, results)
        first, main = results[0].name, main_result(results, self.config.train.seq_len_tokens)
        by_length = {str(each.length_tokens): each.nats for each in results if each.name == first}
        self.events.add(VALIDATION, step=state.step, loss_nats=main.nats, set=first, nats_by_length=by_length)
        return False


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
