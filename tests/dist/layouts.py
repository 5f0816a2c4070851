"""Runs a small model in any layout over ranks."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_bipe.config.deepspeed import engine_config, read_ds_config
from megatron_bipe.config.load import load_run_config
from megatron_bipe.config.schema import RunConfig
from megatron_bipe.config.validate import validate_run
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.types import Batch

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
STEPS, LR = 8, 5e-3


class Layout(NamedTuple):
    """How a model is spread; data-parallel copies fill the ranks that are left."""

    encoding: str = "bipe_rope"
    tensor: int = 1
    pipeline: int = 1
    zero: int = 1
    sequence: bool = False
    recompute: str = "none"
    precision: str = "fp32"


class Outcome(NamedTuple):
    """What a rank saw."""

    losses: list[float]
    norms: list[float]
    held_out: float
    weights: dict[str, torch.Tensor] | None  # whole, out of a checkpoint; on the main rank


def run_config(layout: Layout, run_dir: Path) -> RunConfig:
    """A model of four blocks whose sizes 4 ranks can share."""
    settings = [
        f"run_dir={run_dir}",
        f"model={{encoding: {layout.encoding}, num_layers: 4, hidden_size: 32, num_heads: 4, ffn_size: 48, "
        "vocab_size: 64, intra_size: 16}",
        "optimizer={lr: 1e-3, warmup_steps: 0, grad_clip: 0.5}",
        f"train={{steps: {STEPS}, seq_len_tokens: 16, global_batch: 16, micro_batch: 2, "
        f"precision: {layout.precision}}}",
        f"parallel={{tensor: {layout.tensor}, pipeline: {layout.pipeline}, "
        f"sequence: {str(layout.sequence).lower()}, recompute: {layout.recompute}}}",
    ]
    return load_run_config(None, settings)


def batches(step: int, mesh: Mesh, rows: int = 16) -> list[Batch[torch.Tensor]]:
    """Rows that count in threes, micro-batches of 2, cut like the feed cuts them."""
    generator = torch.Generator().manual_seed(step)
    tokens = (torch.randint(0, 64, (rows, 1), generator=generator) + 3 * torch.arange(17)) % 64
    places = torch.arange(16).expand(2, 16)
    mine = tokens.view(-1, mesh.data_ranks, 2, 17)[:, mesh.data_rank]
    return [Batch(micro[:, :-1], places % 5, places // 5, micro[:, 1:]) for micro in mine]


def start(layout: Layout, mesh: Mesh, run_dir: Path) -> Any:
    """The engine of a layout on this rank, and the mesh laid out."""
    from megatron_bipe.engine.start import start_engine

    run = run_config(layout, run_dir)
    mesh = mesh.laid_out(run.parallel)
    validate_run(run, mesh.num_ranks)
    path = DS_CONFIGS / f"zero{layout.zero}.json"
    return start_engine(run, engine_config(run, read_ds_config(path), mesh.num_ranks, path), mesh), mesh


def train_steps(engine: Any, mesh: Mesh, steps: range) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of some updates."""
    results = [engine.train_step(batches(step, mesh), LR) for step in steps]
    return [float(result.loss_nats) for result in results], [float(result.grad_norm) for result in results]


def train_layouts(mesh: Mesh, layouts: list[Layout], work_dir: str) -> dict[Layout, Outcome]:
    """Each layout for `STEPS` updates, one after the other in the same processes."""
    from megatron_bipe.config.load import dump_yaml
    from megatron_bipe.engine.checkpoint import find_checkpoint
    from megatron_bipe.engine.weights import read_weights

    found = {}
    for number, layout in enumerate(layouts):
        run_dir = Path(work_dir) / f"{mesh.num_ranks}-{number}"
        engine, laid_out = start(layout, mesh, run_dir)
        losses, norms = train_steps(engine, laid_out, range(STEPS))
        held_out = engine.eval_loss(batches(99, laid_out))
        engine.save(run_dir, STEPS)
        weights = None
        if mesh.is_main:
            (run_dir / "config.yaml").write_text(dump_yaml(run_config(layout, run_dir)))
            weights = read_weights(find_checkpoint(run_dir))
        found[layout] = Outcome(losses, norms, held_out, weights)
    return found
