"""One start of a run, from where it stands to its end or to a request to stop, with all that watches over it."""

import logging

from megatron_bipe.config.schema import RunConfig
from megatron_bipe.engine.interface import Engine
from megatron_bipe.model.precision import DTYPES
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.exit_handling import rank_name, write_stderr
from megatron_bipe.runtime.hardware import keep_freed_memory, peak_flops
from megatron_bipe.runtime.preemption import StopRequest
from megatron_bipe.runtime.watchdog import Watchdog
from megatron_bipe.train.batch_loader import BatchLoader
from megatron_bipe.train.events import DONE, START, STOP, Events, read_events
from megatron_bipe.train.loop import Parts, train
from megatron_bipe.train.metrics import Metrics
from megatron_bipe.train.profile import Profile
from megatron_bipe.train.rollback import Rollback
from megatron_bipe.train.train_state import TrainState

_log = logging.getLogger(__name__)


def go_on(
    run: RunConfig,
    mesh: Mesh,
    engine: Engine,
    feed: BatchLoader,
    watchdog: Watchdog,
    stop_request: StopRequest,
    stop: int,
    profile: Profile,
) -> bool:
    """Train from the newest good checkpoint on; all ranks call this together.

    Args:
        run: the run; its folder is there.
        mesh: this process, laid out.
        engine: just started.
        feed: of the batches.
        watchdog: entered.
        stop_request: from now on of all ranks together.
        stop: updates done at the end; where the run is further, nothing is done.
        profile: of some of them.

    Returns:
        Whether it came there; False where it was asked to stop before.
    """
    engine.on_forward(watchdog.heartbeat)
    progress = _stand(run, engine, watchdog)
    if progress.step > stop:
        _log.info("the run is at step %d already, past the %d that are asked for", progress.step, stop)
    keep_freed_memory(mesh.device)  # from here on; what starting and loading took is given back
    events = Events(run.run_dir, mesh.is_main)
    stop_request.agree_by(engine.host.any_rank)
    events.add(START, step=progress.step, ranks=mesh.num_ranks)
    began_at_s = read_events(run.run_dir)[0]["time"] if mesh.is_main else None
    metrics = Metrics(run, mesh, progress, peak_flops(mesh.device, DTYPES[run.train.precision]), began_at_s)
    recovery = Rollback(run, engine, feed, events, progress)
    progress = train(run, Parts(engine, feed, metrics, watchdog, recovery, stop_request, profile), progress, stop)
    profile.close()
    metrics.close()
    finished = progress.step >= stop and not (stop_request.granted and progress.valid_owed)
    goodput = metrics.goodput() if mesh.is_main else None
    events.add(DONE if finished else STOP, step=progress.step, goodput=goodput)
    if stop_request.reason and not finished:
        write_stderr(f"{rank_name(mesh)}: {stop_request.reason}, after step {progress.step}; the same command goes on")
    return finished


def _stand(run: RunConfig, engine: Engine, watchdog: Watchdog) -> TrainState:
    """How far the run is, and its state in the engine."""
    watchdog.mark("the choice of a checkpoint")
    checkpoint = engine.latest_valid_checkpoint(run.run_dir)
    if checkpoint is None:
        return TrainState()
    watchdog.mark(f"loading step {checkpoint.step}")
    progress = TrainState.at(checkpoint.step, run.train.global_batch, engine.load(checkpoint.folder))
    _log.info("continuing %s from step %d", run.run_dir, progress.step)
    return progress
