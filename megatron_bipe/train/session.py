"""One start of a run, from where it stands to its end or to a request to stop, with all that watches over it."""

from megatron_bipe.config.schema import RunConfig
from megatron_bipe.engine.api import Engine
from megatron_bipe.model.precision import DTYPES
from megatron_bipe.parallel.failure import rank_name, say
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.parallel.watchdog import Watchdog
from megatron_bipe.train.events import DONE, START, STOP, Events, read_events
from megatron_bipe.train.feed import Feed
from megatron_bipe.train.hardware import peak_flops
from megatron_bipe.train.loop import Parts, train
from megatron_bipe.train.metrics import Metrics
from megatron_bipe.train.progress import Progress
from megatron_bipe.train.recovery import Recovery
from megatron_bipe.train.stopping import StopRequest


def go_on(
    run: RunConfig,
    mesh: Mesh,
    engine: Engine,
    feed: Feed,
    watchdog: Watchdog,
    stop_request: StopRequest,
    progress: Progress,
    stop: int,
) -> bool:
    """Train; all ranks call this together, after the checkpoint was loaded.

    Args:
        run: the run; its folder is there.
        mesh: this process, laid out.
        engine: with the state of `progress`.
        feed: of the batches.
        watchdog: entered.
        stop_request: from now on of all ranks together.
        progress: how far the run is.
        stop: updates done at the end.

    Returns:
        Whether it came there; False where it was asked to stop before.
    """
    events = Events(run.run_dir, mesh.is_main)
    stop_request.agree_by(engine.agreement.any)
    events.add(START, step=progress.step, ranks=mesh.num_ranks)
    began_at_s = read_events(run.run_dir)[0]["time"] if mesh.is_main else None
    metrics = Metrics(run, mesh, progress, peak_flops(mesh.device, DTYPES[run.train.precision]), began_at_s)
    recovery = Recovery(run, engine, feed, events, progress)
    progress = train(run, Parts(engine, feed, metrics, watchdog, recovery, stop_request), progress, stop)
    metrics.close()
    finished = progress.step == stop and not (stop_request.granted and progress.valid_owed)
    goodput = metrics.goodput() if mesh.is_main else None
    events.add(DONE if finished else STOP, step=progress.step, goodput=goodput)
    if stop_request.reason and not finished:
        say(f"{rank_name(mesh)}: {stop_request.reason}, after step {progress.step}; the same command goes on")
    return finished
