"""What holds as soon as an engine stands: patience of all groups, a state that can be saved, signs of each pass."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bipe.config.deepspeed import engine_config, read_ds_config
from megatron_bipe.config.validate import validate_run
from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.layouts import DS_CONFIGS, LR, Layout, batches, run_config
from tests.helpers.ranks import run_ranks

TIMEOUT_S = 7200
LAYOUTS = {
    "tensor": (2, Layout(tensor=2, zero=1)),
    "context": (2, Layout(context=2, zero=2)),
    "most stages": (3, Layout(pipeline=3, zero=1)),
}


def _started(mesh: Mesh, layout: Layout, work_dir: str) -> tuple[int, set[timedelta], list[float]]:
    """Passes of an update, timeouts of all groups of this rank, and losses of two starts from one checkpoint."""
    from torch.distributed import distributed_c10d

    from megatron_bipe.engine.start import start_engine

    run = run_config(layout, Path(work_dir))
    run = run.model_copy(
        update={
            "model": run.model.model_copy(update={"num_layers": 2}),
            "parallel": run.parallel.model_copy(update={"timeout_s": TIMEOUT_S}),
        }
    )
    mesh, path = mesh.laid_out(run.parallel), DS_CONFIGS / f"zero{layout.zero}.json"
    validate_run(run, mesh.num_ranks)
    engine = start_engine(run, engine_config(run, read_ds_config(path), mesh.num_ranks, path), mesh)
    passes: list[int] = []
    engine.tell_passes(lambda: passes.append(1))
    engine.save(run.run_dir, 0)
    losses = [float(engine.train_step(batches(0, mesh), LR).loss_nats)]
    num_passes = len(passes)
    checkpoint = engine.newest_good(run.run_dir)
    assert checkpoint is not None
    engine.load(checkpoint.folder)
    losses.append(float(engine.train_step(batches(0, mesh), LR).loss_nats))
    backends = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
    return num_passes, {backend.options._timeout for backend in backends}, losses


@pytest.mark.parametrize("name", LAYOUTS)
def test_engine_that_has_started_is_patient_in_all_groups_and_tells_each_pass(name: str, tmp_path: Path) -> None:
    num_ranks, layout = LAYOUTS[name]
    found: list[Any] = run_ranks(_started, num_ranks, tmp_path, layout=layout, work_dir=str(tmp_path / "run"))
    for num_passes, timeouts, losses in found:
        assert num_passes == 16 // 2
        assert timeouts == {timedelta(seconds=TIMEOUT_S + 30)}
        assert losses[0] == losses[1]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_engine_before_its_first_update_has_a_state_to_save(zero: int, precision: str, tmp_path: Path) -> None:
    layout = Layout(zero=zero, precision=precision)
    [(_, _, losses)] = run_ranks(_started, 1, tmp_path, layout=layout, work_dir=str(tmp_path / "run"))
    assert losses[0] == losses[1]
