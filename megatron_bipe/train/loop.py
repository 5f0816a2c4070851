"""The order of a step, visible in one function."""

from megatron_bipe.config.schema import RunConfig
from megatron_bipe.engine.api import Engine
from megatron_bipe.parallel.watchdog import Watchdog
from megatron_bipe.train.feed import Feed
from megatron_bipe.train.metrics import Metrics
from megatron_bipe.train.schedule import learning_rate


def train(
    run: RunConfig, engine: Engine, feed: Feed, metrics: Metrics, watchdog: Watchdog, start: int, stop: int
) -> None:
    """Do updates `start` (from 0) to `stop` of the run; the last one is always followed by a checkpoint."""
    for step in range(start, stop):
        lr = learning_rate(run.optimizer, run.train.steps, step)
        done = step + 1
        result = engine.train_step(watchdog.over(f"step {done}", feed.train_batches(step)), lr)
        metrics.step(done, result, lr)
        if _due(done, run.train.check_replicas_every):
            engine.check_replicas(done)
        if feed.has_valid and (_due(done, run.train.valid_every) or done == run.train.steps):
            metrics.valid(done, engine.eval_loss(watchdog.over(f"validation after step {done}", feed.valid_batches())))
        if _due(done, run.train.save_every) or done == stop:
            metrics.flush()
            watchdog.at(f"checkpoint of step {done}")
            engine.save(run.run_dir, done, final=done == stop)
            metrics.restart_clock()


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
