"""A launch of a run: open its data, lock its folder, start its engine, and train until a step or a stop request."""

import logging
from functools import partial
from typing import Any

from megatron_bipe.config import RunConfig
from megatron_bipe.data.dataset import open_tokenizer
from megatron_bipe.engine.engines import start_engine
from megatron_bipe.engine.interface import Engine
from megatron_bipe.parallel import Mesh
from megatron_bipe.runtime.distributed_init import connect_store
from megatron_bipe.runtime.host_collectives import in_thread
from megatron_bipe.runtime.preemption import StopRequest
from megatron_bipe.runtime.watchdog import Watchdog
from megatron_bipe.train.alerts import keep_webhook, record_and_alert
from megatron_bipe.train.batch_loader import BatchLoader
from megatron_bipe.train.profile import Profile
from megatron_bipe.train.provenance import Given, describe_start
from megatron_bipe.train.read_ahead import reading_ahead
from megatron_bipe.train.run_folder import lock_run_dir, write_run_folder
from megatron_bipe.train.start_check import start_warnings
from megatron_bipe.train.trainer import Trainer

_log = logging.getLogger(__name__)


def train_run(run: RunConfig, mesh: Mesh, ds_config: dict[str, Any], given: Given, stop_request: StopRequest) -> bool:
    """Begin, resume or branch a run and train it; all ranks call this together.

    Args:
        run: the run configuration, validated, its precision resolved.
        mesh: this rank, with the parallel layout.
        ds_config: result of `config.deepspeed.engine_config`.
        given: what the launch was given besides.
        stop_request: receives signals from here on; before, there is nothing to save.

    Returns:
        True if the run has reached `given.stop_step`, False if it was preempted.

    Raises:
        BipeError: the data, the folder or the checkpoint does not fit the run, or training has failed.
    """
    loader = BatchLoader(run, mesh)
    tokenizer = open_tokenizer(loader.dataset)
    stop_request.install_handlers()
    connect = partial(connect_store, name=str(run.run_dir))
    with (
        lock_run_dir(run, loader.record, given.allow, mesh.is_main),
        loader.checking_shards(),
        Watchdog(mesh, run.parallel.timeout_s, connect, partial(record_and_alert, run)) as watchdog,
    ):
        engine = start_engine(run, ds_config, mesh, loader.record)  # all ranks have read the folder by now
        if mesh.is_main:
            for warning in start_warnings(run):
                _log.warning(warning)
            write_run_folder(run, loader.record, tokenizer)
            keep_webhook(run)
        _begin_from_model(run, mesh, engine, watchdog)
        start = describe_start(run, mesh, engine.host, given, loader.record)
        profile = Profile(given.profile_steps, run.run_dir, mesh)
        with reading_ahead(loader, mesh.device) as batches:
            trainer = Trainer(run, mesh, engine, batches, watchdog, stop_request, profile, start)
            is_finished = trainer.run(given.stop_step)
    engine.close()
    stop_request.remove_handlers()
    return is_finished


def _begin_from_model(run: RunConfig, mesh: Mesh, engine: Engine, watchdog: Watchdog) -> None:
    """Write checkpoint 0 of a new run from the model `train.init_from`, if it names one."""
    if run.train.init_from is None:
        return
    from megatron_bipe.train.warm_start import begin_from_model  # imports transformers' models: 2 s

    # A large model takes long to read; the other ranks wait for the main one in rounds.
    for _ in engine.host.in_rounds(in_thread(partial(begin_from_model, run)) if mesh.is_main else ()):
        watchdog.heartbeat()
