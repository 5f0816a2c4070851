"""A started engine sets the timeout of all groups, has a state to save, and reports each forward pass."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.observer import Observer
from tests.helpers.layouts import LR, MICRO, Layout, batches, run_config, start_engine_of
from tests.helpers.ranks import run_ranks

TIMEOUT_S = 7200
ALONE = [Layout(zero=zero, precision=precision) for zero in range(4) for precision in ("bf16", "fp32")]
SPLIT = {2: [Layout(context=2, zero=2), Layout(tensor=2, zero=1)], 3: [Layout(pipeline=3, zero=1)]}


class Started(NamedTuple):
    """Results of a rank."""

    num_passes: int  # of an update
    timeouts: set[timedelta]  # of all groups of this rank
    losses: list[float]  # of two updates from one checkpoint
    listens_at: set[str]  # addresses
    has_progress: bool  # while a checkpoint is written and while it is loaded


def start_all(mesh: Mesh, layouts: list[Layout], work_dir: str) -> list[Started]:
    return [_start(mesh, layout, Path(work_dir) / str(number)) for number, layout in enumerate(layouts)]


def _start(mesh: Mesh, layout: Layout, run_dir: Path) -> Started:
    from torch.distributed import distributed_c10d

    run = run_config(layout, run_dir)
    model = run.model.model_copy(update={"num_layers": 2})
    parallel = run.parallel.model_copy(update={"timeout_s": TIMEOUT_S})
    engine, mesh = start_engine_of(run.model_copy(update={"model": model, "parallel": parallel}), mesh, layout.zero)
    passes: list[int] = []
    observer = Observer()
    observer.progress = lambda: passes.append(1)  # type: ignore[method-assign]
    engine.observe(observer)
    engine.save(run_dir, 0)
    saving = len(passes)
    passes.clear()
    losses = [float(engine.train_step(batches(0, mesh), LR).loss_nats)]
    num_passes = len(passes)
    checkpoint = engine.latest_valid_checkpoint(run_dir)
    assert checkpoint is not None
    passes.clear()
    engine.load(checkpoint.folder)
    loading = len(passes)
    losses.append(float(engine.train_step(batches(0, mesh), LR).loss_nats))
    backends = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
    connections = psutil.Process().net_connections("inet")
    listens_at = {found.laddr.ip for found in connections if found.status == psutil.CONN_LISTEN}
    timeouts = {backend.options._timeout for backend in backends}
    return Started(num_passes, timeouts, losses, listens_at, saving > 0 and loading > 0)


@pytest.mark.parametrize("num_ranks", SPLIT)
def test_started_engine_has_its_timeout_in_all_groups_and_reports_each_forward_pass(
    num_ranks: int, tmp_path: Path
) -> None:
    ranks: list[Any] = run_ranks(start_all, num_ranks, tmp_path, layouts=SPLIT[num_ranks], work_dir=str(tmp_path))
    for rank in ranks:
        for layout, started in zip(SPLIT[num_ranks], rank, strict=True):
            assert started.num_passes == 16 // MICRO, layout
            assert started.timeouts == {timedelta(seconds=TIMEOUT_S + 30)}, layout
            assert started.losses[0] == started.losses[1], layout
            assert started.has_progress, layout
            assert started.listens_at == {"127.0.0.1"}, layout  # the store, and gloo in all groups


class Intruder:
    """An object that runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise AssertionError('unpickled')",)


def exchange(mesh: Mesh) -> list[Any]:
    from megatron_bipe.engine.base import start_deepspeed
    from megatron_bipe.runtime import host_collectives
    from megatron_bipe.runtime.host_collectives import HostCollectives

    start_deepspeed(mesh, 60)
    host = HostCollectives(mesh)
    refused = False
    try:
        host.broadcast_object(Intruder())
    except TypeError:
        refused = True
    values: list[Any] = [[], {"loss": float("inf")}, "é" * 70_000 * (mesh.rank + 1), (mesh.rank, None)]
    host_collectives.ROUND_S = 0.01
    num_rounds = sum(1 for _ in host.in_rounds(time.sleep(0.02) for _ in range(5 * mesh.rank)))
    assert num_rounds == 6, num_rounds  # also of the rank that has nothing to do
    return [refused, *(host.broadcast_object(value) for value in values), *map(host.all_gather_object, values)]


def test_host_collectives_pass_plain_data_and_refuse_what_would_be_pickled(tmp_path: Path) -> None:
    ranks = run_ranks(exchange, 2, tmp_path)
    texts = ["é" * 70_000, "é" * 140_000]
    sent = [[], {"loss": float("inf")}, texts[0], [0, None]]
    gathered = [[[], []], [{"loss": float("inf")}] * 2, texts, [[0, None], [1, None]]]
    assert ranks == [[True, *sent, *gathered]] * 2


def test_engine_before_its_first_update_has_a_state_to_save(tmp_path: Path) -> None:
    (alone,) = run_ranks(start_all, 1, tmp_path, layouts=ALONE, work_dir=str(tmp_path))
    for layout, started in zip(ALONE, alone, strict=True):
        assert started.losses[0] == started.losses[1], layout
