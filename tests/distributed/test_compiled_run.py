"""Runs with `train.compile=on`: with generated code on a CPU, and blocks that communicate with other ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.commands import options
from tests.helpers.layouts import Layout, batches, run_config, start_engine_of, time_limit_s, train_steps
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import losses
from tests.helpers.tools import run_pretrain

pytestmark = pytest.mark.slow
COMPILE_S = 200  # of one run on two busy cores
STEPS = 4
LAYOUTS = [  # data parallelism alone first, as in `tests.helpers.layouts.run_placed`
    Layout(context=2, recompute="full"),
    Layout(tensor=2, sequence=True, encoding="bipe_alibi", recompute="selective"),
    Layout(pipeline=2),
]
ERROR = 1e-5  # relative, of losses and gradient norms in fp32; measured: 1e-7


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, text_dataset: Path) -> Any:
    """Return a function that trains a run by name and returns its losses and output."""
    folder = tmp_path_factory.mktemp("compiled")
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}

    def started(name: str, *arguments: object, compiles: str) -> tuple[list[float], str]:
        settings = options(text_dataset, folder / name, f"train.compile={compiles}", steps=STEPS)
        [ended] = run_pretrain([*settings, *arguments], folder / f"{name}-log", env=cache, time_limit_s=COMPILE_S)
        return losses(folder / name), ended.output

    return started


def test_run_with_generated_code_resumes_and_has_the_losses_of_eager_blocks(train: Any) -> None:
    eager, output = train("eager", compiles="off")
    assert "off (train.compile=off)" in output
    compiled, output = train("compiled", compiles="on")
    assert "on (train.compile=on)" in output
    assert len(eager) == STEPS and compiled == pytest.approx(eager, rel=ERROR)
    train("resumed", "--stop-step", STEPS // 2, compiles="on")
    assert train("resumed", compiles="on")[0] == compiled


def compare(mesh: Mesh, work_dir: str) -> list[list[list[float]]]:
    """Train each layout with eager, then with compiled blocks; return losses and norms of both."""
    compile_any = torch.compile
    torch.compile = lambda f, **options: compile_any(f, backend="aot_eager", **options)  # type: ignore[assignment]
    found = []
    for number, layout in enumerate(LAYOUTS):
        torch._dynamo.reset()
        results = []
        for compiles in ("off", "on"):
            run = run_config(layout, Path(work_dir) / f"{number}-{compiles}")
            train = run.train.model_copy(update={"compile": compiles})
            engine, here = start_engine_of(run.model_copy(update={"train": train}), mesh, layout.zero)
            trained, norms = train_steps(engine, here, range(2))
            results.append([*trained, *norms, engine.eval_loss(batches(99, here)).mean_nats])
        found.append(results)
    return found


def test_blocks_that_communicate_have_the_results_of_eager_ones(tmp_path: Path) -> None:
    limit_s = time_limit_s(LAYOUTS) + COMPILE_S * len(LAYOUTS)
    for rank in run_ranks(compare, 2, tmp_path, time_limit_s=limit_s, work_dir=str(tmp_path)):
        for eager, compiled in rank:
            assert compiled == pytest.approx(eager, rel=ERROR)
