"""Training of a small model in any layout over ranks."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from megatron_bipe.config import RunConfig
from megatron_bipe.config.deepspeed import engine_config, read_ds_config
from megatron_bipe.config.load import load_run_config
from megatron_bipe.config.validate import validate_run
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.types import Batch
from tests.helpers.paths import ROOT
from tests.helpers.ranks import TIME_LIMIT_S, run_ranks

DS_CONFIGS = ROOT / "ds_configs"
T = TypeVar("T")
STEPS, LR, MICRO = 8, 5e-3, 4
LAYOUT_S = 30  # for a layout in a launch: 6 s were measured on two cores with a second launch, which steal may triple


class Layout(NamedTuple):
    """Parallel layout of a model; the remaining ranks hold data-parallel replicas."""

    encoding: str = "bipe_rope"
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    zero: int | str = 1  # stage, or the name of a file of ds_configs after it
    sequence: bool = False
    recompute: str = "none"
    precision: str = "fp32"
    micro: int = MICRO  # sequences in a micro-batch
    clip: float = 0.5  # clips in every step; 0: none
    model: str = ""  # further fields of the model, as YAML

    def __str__(self) -> str:
        """Return the fields that differ from the defaults."""
        fields = ((name, value, self._field_defaults[name]) for name, value in self._asdict().items())
        return " ".join(f"{name}={value}" for name, value, default in fields if value != default) or "data parallel"


class Placed(NamedTuple):
    """A layout on a number of ranks."""

    ranks: int
    layout: Layout

    def __str__(self) -> str:
        return f"{self.ranks} ranks: {self.layout}"


class Outcome(NamedTuple):
    """Results of a rank."""

    losses: list[float]
    norms: list[float]
    held_out: float
    by_position: list[float]  # held-out losses of the parts of sequences of two lengths, NaN for parts without weight
    weights: dict[str, torch.Tensor] | None  # unsharded, from a checkpoint; on the main rank


class Difference(NamedTuple):
    """Largest differences from one process, measured or allowed."""

    loss: float  # relative, the held-out loss included
    norm: float  # relative, of the gradient before clipping
    weight: float  # absolute

    def within(self, allowed: "Difference") -> bool:
        """Return True if each difference is within its limit; NaN never is."""
        return all(found <= limit for found, limit in zip(self, allowed, strict=True))


# At least twice the largest value in docs/parallelism.md; for bf16, that of test_layouts.py.
FP32 = Difference(loss=2e-6, norm=2e-5, weight=1e-4)  # Adam divides small gradients by their own size
BF16 = Difference(loss=1e-2, norm=1e-1, weight=1e-1)
EXACT = Difference(loss=0.0, norm=1e-6, weight=0.0)  # the norm is a sum over stages in another order


def allowed(layout: Layout, num_ranks: int) -> Difference:
    """Return the allowed difference from one process; stages alone change only the order of the norm's sum."""
    if layout.precision == "bf16":
        return BF16
    return EXACT if layout.pipeline == num_ranks and not layout.clip else FP32


def reference(layout: Layout) -> Layout:
    """Return the layout of the same training by one process."""
    return Layout(layout.encoding, precision=layout.precision, micro=layout.micro, clip=layout.clip, model=layout.model)


def run_config(layout: Layout, run_dir: Path) -> RunConfig:
    """Return a run of a model with four blocks whose sizes are divisible by 4 ranks."""
    settings = [
        f"run_dir={run_dir}",
        f"model={{encoding: {layout.encoding}, num_layers: 4, hidden_size: 32, num_heads: 4, ffn_size: 48, "
        f"vocab_size: 64, intra_size: 16, {layout.model}}}",
        f"optimizer={{lr: 1e-3, warmup_steps: 0, grad_clip: {layout.clip}}}",
        f"train={{steps: {STEPS}, seq_len_tokens: 16, global_batch: 16, micro_batch: {layout.micro}, "
        f"precision: {layout.precision}}}",
        f"parallel={{tensor: {layout.tensor}, context: {layout.context}, pipeline: {layout.pipeline}, "
        f"sequence: {str(layout.sequence).lower()}, recompute: {layout.recompute}}}",
    ]
    return load_run_config(None, settings)


def batches(
    step: int, mesh: Mesh, rows: int = 16, micro: int = MICRO, seq_len_tokens: int = 16
) -> list[Batch[torch.Tensor]]:
    """Return micro-batches of sequences that count in threes, divided among ranks like those of the batch loader."""
    generator = torch.Generator().manual_seed(step)
    tokens = (torch.randint(0, 64, (rows, 1), generator=generator) + 3 * torch.arange(seq_len_tokens + 1)) % 64
    positions = torch.arange(seq_len_tokens).expand(micro, seq_len_tokens)
    mine = tokens.view(-1, mesh.data_ranks, micro, seq_len_tokens + 1)[:, mesh.data_rank]
    return [Batch(sequences[:, :-1], positions % 5, positions // 5, sequences[:, 1:]) for sequences in mine]


def start(layout: Layout, mesh: Mesh, run_dir: Path) -> Any:
    """Return the engine and mesh of a layout on this rank."""
    return start_engine_of(run_config(layout, run_dir), mesh, layout.zero)


def start_engine_of(run: RunConfig, mesh: Mesh, zero: int | str) -> tuple[Any, Mesh]:
    """Return the engine and mesh of a run on this rank."""
    from megatron_bipe.engine.engines import start_engine

    mesh, path = mesh.with_layout(run.parallel), DS_CONFIGS / f"zero{zero}.json"
    validate_run(run, mesh.num_ranks)
    return start_engine(run, engine_config(run, read_ds_config(path), mesh.num_ranks, path), mesh), mesh


def train_steps(engine: Any, mesh: Mesh, steps: range, micro: int = MICRO) -> tuple[list[float], list[float]]:
    """Return losses and gradient norms of some updates."""
    results = [engine.train_step(batches(step, mesh, micro=micro), LR) for step in steps]
    return [float(result.loss_nats) for result in results], [float(result.grad_norm) for result in results]


def run_placed(
    function: Callable[..., dict[Layout, T]], placed: Collection[Placed], folder: Path, **arguments: Any
) -> dict[Placed, list[T]]:
    """Call `function(mesh, layouts, work_dir, **arguments)` in one launch for each number of ranks.

    Returns:
        By layout and number of ranks, what each rank returned for it.
    """
    found = {}
    for num_ranks in sorted({num_ranks for num_ranks, _ in placed}):
        layouts = [layout for number, layout in placed if number == num_ranks]
        # Data parallelism alone first: DeepSpeed keeps the groups of an earlier engine, and would then miss some.
        layouts.sort(key=lambda layout: layout.tensor * layout.pipeline)
        work_dir = folder / str(num_ranks)
        limit_s, shared = time_limit_s(layouts), {"layouts": layouts, "work_dir": str(work_dir)}
        ranks = run_ranks(function, num_ranks, work_dir, time_limit_s=limit_s, **shared, **arguments)
        found |= {Placed(num_ranks, layout): [rank[layout] for rank in ranks] for layout in layouts}
    return found


def time_limit_s(layouts: Collection[object]) -> float:
    """Return the time limit of a launch that trains layouts one after the other."""
    return TIME_LIMIT_S + LAYOUT_S * len(layouts)


def held_out_by_position(engine: Any, mesh: Mesh, micro: int, longest: int | None) -> list[float]:
    """Return held-out losses of the parts of sequences at the training length, and with weights at a longer one.

    The longer one is 32 tokens, or the longest that the encoding supports (None: any).
    """
    num_tokens = min(32, longest or 32)
    longer = batches(98, mesh, micro=max(1, micro // 2), seq_len_tokens=num_tokens)
    weights_BT = (
        (torch.arange(num_tokens) % 8 >= 4).float().expand(longer[0].tokens_BT.shape).contiguous()
    )  # half of the parts
    weighted = [batch._replace(weights_BT=weights_BT) for batch in longer]
    sums = [engine.eval_loss(each) for each in (batches(99, mesh, micro=micro), weighted)]
    return [nats for each in sums for nats in each.nats_by_position]


def train_layouts(mesh: Mesh, layouts: list[Layout], work_dir: str, steps: int = STEPS) -> dict[Layout, Outcome]:
    """Train each layout for some updates, one after the other in the same processes."""
    found = {}
    for number, layout in enumerate(layouts):
        try:
            found[layout] = train_layout(mesh, layout, Path(work_dir) / str(number), steps)
        except Exception as error:
            error.add_note(f"in {layout} on {mesh.num_ranks} ranks")
            raise
    return found


def train_layout(mesh: Mesh, layout: Layout, run_dir: Path, steps: int) -> Outcome:
    """Train a layout for some updates; return this rank's results and the content of its checkpoint."""
    from megatron_bipe.checkpoint.find import find_checkpoint
    from megatron_bipe.checkpoint.verify import read_weights
    from megatron_bipe.config.load import dump_yaml

    engine, mesh_here = start(layout, mesh, run_dir)
    losses, norms = train_steps(engine, mesh_here, range(steps), layout.micro)
    held_out = engine.eval_loss(batches(99, mesh_here, micro=layout.micro)).mean_nats
    longest = run_config(layout, run_dir).model.max_seq_len_tokens
    by_position = held_out_by_position(engine, mesh_here, layout.micro, longest)
    engine.save(run_dir, steps)
    if not mesh.is_main:
        return Outcome(losses, norms, held_out, by_position, None)
    (run_dir / "config.yaml").write_text(dump_yaml(run_config(layout, run_dir)))
    return Outcome(losses, norms, held_out, by_position, read_weights(find_checkpoint(run_dir)))


def difference(ranks: list[Outcome], expected: Outcome) -> Difference:
    """Return the largest difference over ranks and steps; all ranks must have the same results."""
    weights, expected_weights = ranks[0].weights, expected.weights
    assert weights is not None and expected_weights is not None
    assert weights.keys() == expected_weights.keys()
    return Difference(
        _relative([[*found.losses, found.held_out] for found in ranks], [*expected.losses, expected.held_out]),
        _relative([found.norms for found in ranks], expected.norms),
        float(
            torch.stack(
                [(weights[name].float() - expected_weights[name].float()).abs().max() for name in weights]
            ).max()
        ),
    )


def _relative(found: list[list[float]], expected: list[float]) -> float:
    """Return the largest relative difference of any rank; NaN if there is one."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    return float(((torch.tensor(found, dtype=torch.float64) - wanted) / wanted).abs().max())
