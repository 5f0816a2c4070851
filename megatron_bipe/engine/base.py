"""The common part of both engines: layers, optimizer, gradient norm, checkpoints, and DeepSpeed's setup."""

import io
import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_bipe.checkpoint.find import Checkpoint, find_trunk
from megatron_bipe.checkpoint.manifest import CheckpointInfo, CheckpointManifest
from megatron_bipe.checkpoint.shard_files import Fragment, StateReader, random_states, set_random_states
from megatron_bipe.checkpoint.verify import belongs_to_another_run, check_trunk, latest_valid_checkpoint
from megatron_bipe.checkpoint.writer import CheckpointWriter
from megatron_bipe.config import OptimizerConfig, RunConfig, zero_stage
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.engine.deepspeed_internals import (
    fragments,
    is_sharded,
    load_optimizer_state,
    optimizer_steps,
    reset_adam_state,
    set_group_timeouts,
    skip_operator_probe,
    warn_of_unknown_versions,
)
from megatron_bipe.engine.gradients import GradientClipper, adapt_offload, make_clipper, sums_in_fp32
from megatron_bipe.engine.interface import LossSums
from megatron_bipe.errors import ConfigError
from megatron_bipe.model import NUM_PARTS, LayerFactory, LocalLayers, shard_of
from megatron_bipe.parallel import (
    Mesh,
    Replicas,
    TensorParallelLayers,
    UlyssesExchange,
    all_gather_json,
    check_replicas,
    context_group,
    tensor_group,
)
from megatron_bipe.runtime.distributed_init import connect_store, host_store, port_error
from megatron_bipe.runtime.exit_handling import rank_name
from megatron_bipe.runtime.hardware import choose_compile
from megatron_bipe.runtime.host_collectives import HostCollectives
from megatron_bipe.runtime.observer import Observer
from megatron_bipe.types import Batch

_WATCHDOG_HEAD_START_S = 30  # a hang is first seen by the watchdog, then by the timeout of collectives


def start_deepspeed(mesh: Mesh, timeout_s: float) -> None:
    """Create the process group of all ranks, unless it exists.

    Args:
        mesh: this process among the ranks.
        timeout_s: longest wait for other ranks, `parallel.timeout_s`. Collectives have a longer timeout, so that the
            watchdog, which can name the ranks, detects a hang first.

    Raises:
        ConfigError: another launch on this host uses the port.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls functions of torch that are deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if mesh.is_main:
        warn_of_unknown_versions()
    skip_operator_probe()
    backend = "nccl" if mesh.device.type == "cuda" else "gloo"
    store = None if dist.is_initialized() else host_store(mesh)
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=_collective_timeout(timeout_s))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise port_error(str(error)) from error
    del store  # torch's group has the same server


def check_precision(mesh: Mesh, run: RunConfig) -> None:
    """Compare the resolved precision of all ranks; they call this together, after the process group exists.

    Raises:
        ConfigError: on all ranks, if `train.precision=auto` resolved differently on different hosts.
    """
    seen = all_gather_json([run.train.precision, rank_name(mesh)])
    first_by_precision: dict[str, str] = dict(reversed(seen))
    if len(first_by_precision) > 1:
        found = ", ".join(f"{precision} on {name}" for precision, name in sorted(first_by_precision.items()))
        raise ConfigError(
            f"train.precision=auto resolves to {found}; all ranks must compute in the same precision",
            remedy="Set the precision: --set train.precision=fp32, or bf16",
            location="train.precision",
        )


def _collective_timeout(timeout_s: float) -> timedelta:
    return timedelta(seconds=timeout_s + _WATCHDOG_HEAD_START_S)


def make_layers(mesh: Mesh, compiles: bool = False) -> tuple[LayerFactory, dist.ProcessGroup | None]:
    """Return the layer factory of this mesh and the tensor-parallel group, if any; all ranks must call this."""
    exchange = UlyssesExchange(context_group(mesh)) if mesh.context > 1 else None
    if mesh.tensor == 1:
        return LocalLayers(exchange, compiles=compiles), None
    group = tensor_group(mesh)
    return TensorParallelLayers(group, mesh.sequence, exchange, compiles=compiles), group


@contextmanager
def suppress_stdout() -> Iterator[None]:
    """Discard what DeepSpeed prints during startup; failures raise."""
    with redirect_stdout(io.StringIO()):
        yield


def make_topology(mesh: Mesh) -> PipeModelDataParallelTopology:
    """Return the mesh as DeepSpeed's topology, with the same order of ranks.

    DeepSpeed treats context-parallel ranks as data-parallel: their gradients, each of a loss over some of the tokens,
    are averaged just as those of other sequences.
    """
    return PipeModelDataParallelTopology(num_pp=mesh.pipeline, num_mp=mesh.tensor, num_dp=mesh.replica_ranks)


def make_grid(mesh: Mesh) -> PipelineParallelGrid:
    """Create DeepSpeed's process groups of the mesh."""
    with suppress_stdout():
        return PipelineParallelGrid(topology=make_topology(mesh))


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make a fused AdamW with weight decay on matrices and embeddings, not on norm weights.

    The learning rate is 0 until the first step, because DeepSpeed's bf16 optimizer without ZeRO takes a step during
    setup.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def on_device(batch: Batch[Tensor], device: torch.device) -> Batch[Tensor]:
    """Move a micro-batch to the model's device, where int32 ids become int64, without waiting for pinned memory."""
    fields = (field.to(device, non_blocking=True) for field in batch if field is not None)
    return Batch(*(field.long() if field.dtype == torch.int32 else field for field in fields))


def mean_loss(losses_BT: Tensor, weights_BT: Tensor | None = None) -> Tensor:
    """Return the mean over tokens; if it is not finite, the entire gradient becomes NaN, so that the update is skipped.

    Args:
        losses_BT: losses in nats.
        weights_BT: weights of the same tokens, as in `Batch`.
    """
    mean = (losses_BT if weights_BT is None else losses_BT * weights_BT).mean()
    return mean * torch.where(mean.detach().isfinite(), 1.0, torch.nan)


def loss_sums(losses_Bt: Tensor, weights_Bt: Tensor | None, parts_1t: Tensor) -> Tensor:
    """Return the weighted sum of losses and the sum of the weights by part of the sequence, fp64 [Q, 2].

    fp64 sums hardly depend on the order.

    Args:
        losses_Bt: losses of this rank's positions, in nats.
        weights_Bt: their weights; None: 1.
        parts_1t: the part that each position is in, see `position_parts`.
    """
    losses_Bt = losses_Bt.double()
    weights_Bt = torch.ones_like(losses_Bt) if weights_Bt is None else weights_Bt.double()
    by_position_t2 = torch.stack([(losses_Bt * weights_Bt).sum(0), weights_Bt.sum(0)], dim=1)
    return by_position_t2.new_zeros(NUM_PARTS, 2).index_add_(0, parts_1t[0], by_position_t2)


def position_parts(labels_BT: Tensor) -> Tensor:
    """Return the part of the sequence that each position is in, int64 [1, T]."""
    num_tokens = labels_BT.shape[1]
    return (torch.arange(num_tokens, device=labels_BT.device) * NUM_PARTS // num_tokens)[None]


class ForwardTimer:
    """Sum of the durations of a module's forward passes, to distinguish a slow rank from those that wait for it.

    All ranks finish a step together, whichever was slow. The forward pass of a data-parallel rank or of a stage waits
    for no other rank; with tensor parallelism or ZeRO 3 it waits within its group, which is then slow as a unit.

    Args:
        module: module to time; it gets hooks.
        device: device of the module. A GPU is timed by events, so that only `take_s` waits for it.
        wanted: False disables the timer.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, wanted: bool) -> None:
        self._on_gpu = device.type == "cuda"
        self._passes: list[tuple[Any, Any]] = []  # begin and end, as events or seconds
        self._began: Any = None
        if wanted:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def pop_seconds(self) -> float:
        """Return the seconds since the last call and reset the sum."""
        passes, self._passes = self._passes, []
        if not self._on_gpu:
            return float(sum(end - begin for begin, end in passes))
        if passes:
            passes[-1][1].synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in passes)) / 1000

    def _begin(self, *_: Any) -> None:
        self._began = self._now()

    def _end(self, *_: Any) -> None:
        self._passes.append((self._began, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class DeepSpeedEngine:
    """The part of an engine that is independent of how the plan runs; `__init__` of subclasses sets the attributes."""

    _mesh: Mesh
    _run: RunConfig
    _data: DataRecord | None  # record of the training data, stored in checkpoints
    host: HostCollectives
    _saver: CheckpointWriter
    _engine: Any  # DeepSpeed's engine
    _optimizer: Any  # DeepSpeed's wrapper of the optimizer
    _observer = Observer()
    _clipper: GradientClipper | None  # None where DeepSpeed clips
    _own_time: ForwardTimer
    _tensor_group: dist.ProcessGroup | None  # None without tensor parallelism

    def _make_layers(self, run: RunConfig, ds_config: dict[str, Any]) -> LayerFactory:
        """Return the layer factory of this rank; all ranks must call this."""
        on_gpu = self._mesh.device.type == "cuda"
        compiles = choose_compile(run, zero_stage(ds_config), on_gpu=on_gpu).compiles
        layers, self._tensor_group = make_layers(self._mesh, compiles)
        return layers

    def _initialize(
        self,
        model: nn.Module,
        run: RunConfig,
        ds_config: dict[str, Any],
        model_group: dist.ProcessGroup | None,
        mpu: PipelineParallelGrid | None = None,
    ) -> None:
        """Pass the model and its optimizer to DeepSpeed, and take over the update where `engine.gradients` has its own.

        Args:
            model: this rank's part.
            run: the run configuration.
            ds_config: see `start_engine`.
            model_group: see `make_clipper`.
            mpu: DeepSpeed's groups, unless the model provides them.
        """
        optimizer = make_optimizer(model, run.optimizer)
        if run.train.precision == "fp32" and zero_stage(ds_config) == 0:  # DeepSpeed would clip before `_clipper` does
            ds_config = ds_config | {"gradient_clipping": 0.0}
        with suppress_stdout():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=ds_config, dist_init_required=False, mpu=mpu
            )
        self._clipper = make_clipper(self._optimizer, run.optimizer.grad_clip, self._mesh, model_group)
        if sums_in_fp32(self._optimizer):  # `engine.gradients` adds them up over replicas
            self._engine.enable_backward_allreduce = self._engine.pipeline_enable_backward_allreduce = False
        adapt_offload(self._optimizer)
        reset_adam_state(self._optimizer)
        self._own_time = ForwardTimer(self._engine.module, self._mesh.device, wanted=run.health.compare_ranks_every > 0)
        self._run, self.host = run, HostCollectives(self._mesh)
        set_group_timeouts(_collective_timeout(run.parallel.timeout_s))
        self._saver = CheckpointWriter(
            run.checkpoint, self._mesh, self.host, lambda: connect_store(run.parallel.timeout_s, str(run.run_dir))
        )
        self._saver.reserve(self._fragments_to_write())
        optimizer.register_step_pre_hook(lambda *_: self._saver.before_update())

    def observe(self, observer: Observer) -> None:
        self._observer = self._saver.observer = observer
        self._engine.module.register_forward_pre_hook(lambda *_: observer.progress())

    def _held_out(self, sums: list[Tensor]) -> LossSums:
        """Return the sums over all ranks.

        Args:
            sums: results of `loss_sums` for the losses that this rank has computed.
        """
        none = torch.zeros(NUM_PARTS, 2, dtype=torch.float64, device=self._mesh.device)
        total_Q2 = torch.stack([none, *sums]).sum(0)
        dist.all_reduce(total_Q2)
        return LossSums(*total_Q2.T.tolist())

    def pop_forward_seconds(self) -> float:
        return self._own_time.pop_seconds()

    def save(
        self, run_dir: Path, step: int, *, loop_state: Mapping[str, Any] | None = None, final: bool = True
    ) -> None:
        mesh, zero = self._mesh, self._engine.zero_optimization_stage()
        layout = {"ranks": mesh.num_ranks, "tensor": mesh.tensor, "pipeline": mesh.pipeline, "zero": zero}
        config = self._run.model_dump(mode="json")
        info = CheckpointInfo(
            step, optimizer_steps(self._optimizer), layout, config, self._data, dict(loop_state or {})
        )
        self._saver.save(run_dir, info, self._fragments_to_write(), random_states(mesh.device), final=final)

    def latest_valid_checkpoint(self, run_dir: Path) -> Checkpoint | None:
        self._saver.finish()
        given = (self._foreign, self._mesh, self.host, self._observer)
        return latest_valid_checkpoint(run_dir, *given) or self._valid_trunk()

    def _valid_trunk(self) -> Checkpoint | None:
        """Return the checkpoint that the run branches from, verified as its own ones are; None without one."""
        if self._run.train.branch_from is None:
            return None
        trunk = find_trunk(self._run.train.branch_from)
        check_trunk(trunk, self._foreign, self._mesh, self.host, self._observer)
        return trunk

    def _foreign(self, index: CheckpointManifest) -> str:
        return belongs_to_another_run(index, self._run, self._data)

    def finish_save(self) -> None:
        self._saver.finish()

    def load(self, folder: Path) -> dict[str, Any]:
        self._saver.finish()
        reader = StateReader(folder)
        load_optimizer_state(self._engine.module, self._optimizer, reader, self._in_rounds)
        set_random_states(reader.random(self._mesh.rank), self._mesh.device)
        return reader.index.loop_state

    def _in_rounds(self, work: Iterable[object]) -> None:
        for _ in self.host.in_rounds(work):
            self._observer.progress()

    def _fragments_to_write(self) -> list[Fragment]:
        """Return the fragments that this rank writes; ranks with replicated fragments each write a part of them."""
        mesh = self._mesh
        held = [f for f in fragments(self._engine.module, self._optimizer) if not f.is_copy]
        mine = [fragment for fragment in held if fragment.shard is not None or mesh.tensor_rank == 0]
        if is_sharded(self._optimizer):
            return mine
        return [fragment.part(mesh.replica_rank, mesh.replica_ranks) for fragment in mine]

    def check_replicas(self, step: int) -> None:
        weights, checks = dict(self._engine.module.named_parameters()), []
        if self._tensor_group is not None:
            full = {name: p for name, p in weights.items() if shard_of(p) is None}
            held = [f for f in fragments(self._engine.module, self._optimizer) if f.shard is None]
            replicated = {f"{name} (compute weight)": getattr(p, "ds_tensor", p) for name, p in full.items()}
            replicated |= {f"{f.name} ({kind})": tensor for f in held for kind, tensor in f.state.items()}
            checks.append(Replicas("tensor-parallel ranks", self._tensor_group, replicated))
        if self._engine.zero_optimization_stage() < 3:  # ZeRO 3 shards all weights
            checks.append(Replicas("copies of the weights on ranks", self._engine.data_parallel_group, weights))
        check_replicas(checks, step)

    def close(self) -> None:
        self._saver.close()
        self._engine.destroy()
        dist.destroy_process_group()

    def _set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def _grad_norm(self) -> Tensor | float:
        norm: Tensor | float | None = self._clipper.norm if self._clipper else self._engine.get_global_grad_norm()
        assert norm is not None  # after a step
        return norm
