"""What both engines share: how layers are made, the optimizer, the gradient norm, and DeepSpeed's manners."""

import io
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from megatron_bipe.checkpoint.find import Checkpoint
from megatron_bipe.checkpoint.manifest import CheckpointInfo
from megatron_bipe.checkpoint.rng_state import random_states, set_random_states
from megatron_bipe.checkpoint.shard_files import Fragment, StateReader
from megatron_bipe.checkpoint.verify import belongs_to_another_run, latest_valid_checkpoint
from megatron_bipe.checkpoint.writer import CheckpointWriter
from megatron_bipe.config.deepspeed import zero_stage
from megatron_bipe.config.schema import OptimizerConfig, RunConfig
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.engine.forward_timer import ForwardTimer
from megatron_bipe.engine.optimizer_state import (
    fragments,
    is_sharded,
    load_optimizer_state,
    optimizer_steps,
    reset_adam_state,
)
from megatron_bipe.errors import ConfigError
from megatron_bipe.model.layer_factory import LayerFactory, shard_of
from megatron_bipe.model.transformer import LocalLayers, copied
from megatron_bipe.parallel.context_parallel import UlyssesExchange
from megatron_bipe.parallel.mesh import Mesh, context_group, tensor_group
from megatron_bipe.parallel.replica_check import Replicas, check_replicas
from megatron_bipe.parallel.tensor_parallel import TensorParallelLayers
from megatron_bipe.runtime.distributed_init import connect_store
from megatron_bipe.runtime.exit_handling import rank_name
from megatron_bipe.runtime.host_collectives import HostCollectives
from megatron_bipe.types import Batch

_WATCHDOG_HEAD_START_S = 30


def start_deepspeed(mesh: Mesh, timeout_s: float) -> None:
    """Form the process group of all ranks, if there is none yet.

    Keeps DeepSpeed from probing its compiled operators, and so from compiling a collective that only inference uses: on
    a CPU it would build that shared-memory operator at every first start on a machine, for about a minute.

    Args:
        mesh: this process.
        timeout_s: longest wait for other ranks, `parallel.timeout_s`. Collectives get some more, so that the watchdog,
            which can name the ranks, is the first to see it.

    Raises:
        ConfigError: another launch on this host has the port.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Every operator counts as not compiled; DeepSpeed would probe them all, with a warning for each that cannot be.
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010  # reading the attribute would already probe
    backend = "nccl" if mesh.device.type == "cuda" else "gloo"
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=_collective_timeout(timeout_s))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"the port where the ranks meet is taken, by another launch on this host perhaps: {error}",
            remedy="Give this launch another: deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT",
            location=f"MASTER_PORT of {rank_name(mesh)}",
        ) from error


def check_precision(mesh: Mesh, run: RunConfig) -> None:
    """Compare the settled precision of all ranks, which call this together; the process group stands.

    Raises:
        ConfigError: on all ranks: `train.precision=auto` came out differently on hosts of different kinds.
    """
    seen: list[Any] = [None] * mesh.num_ranks
    dist.all_gather_object(seen, (run.train.precision, rank_name(mesh)))
    first_by_precision = dict(reversed(seen))
    if len(first_by_precision) > 1:
        found = ", ".join(f"{precision} on {name}" for precision, name in sorted(first_by_precision.items()))
        raise ConfigError(
            f"train.precision=auto is {found}: all ranks must compute in one precision, and these hosts differ",
            remedy="Name the precision: --set train.precision=fp32, or bf16",
            location="train.precision",
        )


def set_group_timeouts(timeout_s: float) -> None:
    """Give all groups of this rank the timeout of `start_deepspeed`, DeepSpeed's own included.

    A group is formed with torch's default, 10 or 30 minutes, whatever that of the group of all ranks is.
    """
    for group in list(distributed_c10d._world.pg_map):
        if not distributed_c10d._rank_not_in_group(group):
            distributed_c10d._set_pg_timeout(_collective_timeout(timeout_s), group)


def _collective_timeout(timeout_s: float) -> timedelta:
    return timedelta(seconds=timeout_s + _WATCHDOG_HEAD_START_S)


def make_layers(mesh: Mesh) -> tuple[LayerFactory, dist.ProcessGroup | None]:
    """The factory that this mesh asks for, and the ranks that share layers; every rank of the launch calls it."""
    exchange = UlyssesExchange(context_group(mesh)) if mesh.context > 1 else None
    if mesh.tensor == 1:
        return LocalLayers(exchange), None
    group = tensor_group(mesh)
    return TensorParallelLayers(group, mesh.sequence, exchange), group


@contextmanager
def suppress_stdout() -> Iterator[None]:
    """Keep back what DeepSpeed prints as it starts; what goes wrong raises."""
    with redirect_stdout(io.StringIO()):
        yield


def make_topology(mesh: Mesh) -> PipeModelDataParallelTopology:
    """The mesh in DeepSpeed's words; its order of ranks is the same.

    Ranks that share a window are data-parallel ones to it: their gradients, each of a loss over some of the tokens, are
    averaged just as those of other windows are.
    """
    return PipeModelDataParallelTopology(num_pp=mesh.pipeline, num_mp=mesh.tensor, num_dp=mesh.replica_ranks)


def make_grid(mesh: Mesh) -> PipelineParallelGrid:
    """DeepSpeed's groups of the mesh, for its engine."""
    with suppress_stdout():
        return PipelineParallelGrid(topology=make_topology(mesh))


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused AdamW; matrices and tables decay, norm weights do not.

    The learning rate is 0 until a step is to be taken: DeepSpeed's bf16 optimizer without ZeRO takes one as it starts.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def deepspeed_clips(run: RunConfig, ds_config: dict[str, Any]) -> bool:
    """Whether DeepSpeed keeps the gradient norm and clips by it: in all cases but fp32 without ZeRO."""
    return run.train.precision != "fp32" or zero_stage(ds_config) > 0


def on_device(batch: Batch[Tensor], device: torch.device) -> Batch[Tensor]:
    """A micro-batch where the model is."""
    return Batch(*(field.to(device, non_blocking=True) for field in batch if field is not None))


def mean_loss(losses_BT: Tensor, weights_BT: Tensor | None = None) -> Tensor:
    """The mean over tokens; one that is not finite makes the whole gradient NaN, so that the update is left out.

    Args:
        losses_BT: in nats.
        weights_BT: as `Batch` has them, of the same tokens.
    """
    mean = (losses_BT if weights_BT is None else losses_BT * weights_BT).mean()
    return mean * torch.where(mean.detach().isfinite(), 1.0, torch.nan)


class PlainGradients:
    """Norm, clipping and the check for NaN where DeepSpeed keeps no norm, and counts that of stages wrongly.

    An update whose norm is not finite is left out by the optimizer itself, on the device: nothing waits for the norm.
    In all other cases DeepSpeed leaves it out, and gives infinity as the norm.

    Args:
        optimizer: whose steps are to be preceded by this; DeepSpeed must not clip before.
        clip: largest norm; 0: no clipping.
        mesh: this process among the ranks.
        model_group: ranks that hold the parts of one model, over stages and tensor-parallel ranks; None if it is one.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, clip: float, mesh: Mesh, model_group: dist.ProcessGroup | None
    ) -> None:
        self._clip, self._mesh, self._group = clip, mesh, model_group
        self.norm: Tensor | None = None
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # What is whole on every tensor-parallel rank counts once, and so does what two stages have.
        whole_here = self._mesh.tensor_rank == 0
        counted = [p.grad for p in parameters if (whole_here or shard_of(p) is not None) and not copied(p)]
        squares = torch.nn.utils.get_total_norm(counted).to(self._mesh.device) ** 2
        if self._group is not None:
            dist.all_reduce(squares, group=self._group)
        self.norm = squares.sqrt()
        optimizer.found_inf = 1 - self.norm.isfinite().float()  # type: ignore[attr-defined]  # torch's fused AdamW asks
        if self._clip > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip, self.norm)


class DeepSpeedEngine:
    """What does not depend on how the plan is run; `__init__` of a kind of engine sets these attributes."""

    _mesh: Mesh
    _run: RunConfig
    _data: DataRecord | None  # what it trains on, for checkpoints to remember
    host: HostCollectives
    _saver: CheckpointWriter
    _engine: Any  # DeepSpeed's
    _optimizer: Any  # what DeepSpeed made of ours
    _plain: PlainGradients | None = None
    _own_time: ForwardTimer
    _tensor_group: dist.ProcessGroup | None  # ranks that share this one's layers; None where none does

    def _initialize(
        self,
        model: nn.Module,
        run: RunConfig,
        ds_config: dict[str, Any],
        model_group: dist.ProcessGroup | None,
        mpu: PipelineParallelGrid | None = None,
    ) -> None:
        """Hand the model and its optimizer to DeepSpeed, and take over the gradient norm where it keeps none.

        Args:
            model: this rank's part.
            run: the run configuration.
            ds_config: see `ZeroEngine`.
            model_group: as `PlainGradients` takes it.
            mpu: DeepSpeed's groups, where the model does not bring them.
        """
        optimizer = make_optimizer(model, run.optimizer)
        if not deepspeed_clips(run, ds_config):
            self._plain = PlainGradients(optimizer, run.optimizer.grad_clip, self._mesh, model_group)
            ds_config = ds_config | {"gradient_clipping": 0.0}
        with suppress_stdout():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=ds_config, dist_init_required=False, mpu=mpu
            )
        if self._mesh.replica_ranks == 1 and hasattr(self._optimizer, "get_grads_for_reduction"):  # bf16 with ZeRO 1
            # With no one to exchange them with, DeepSpeed would still copy all gradients together and back.
            self._engine.enable_backward_allreduce = self._engine.pipeline_enable_backward_allreduce = False
        reset_adam_state(self._optimizer)
        self._own_time = ForwardTimer(self._engine.module, self._mesh.device, wanted=run.health.compare_ranks_every > 0)
        self._run, self.host = run, HostCollectives(self._mesh)
        set_group_timeouts(run.parallel.timeout_s)
        self._saver = CheckpointWriter(
            run.checkpoint, self._mesh, self.host, lambda: connect_store(run.parallel.timeout_s)
        )
        optimizer.register_step_pre_hook(lambda *_: self._saver.before_update())

    def on_forward(self, to: Callable[[], None]) -> None:
        """See `Engine.on_forward`."""
        self._engine.module.register_forward_pre_hook(lambda *_: to())

    def pop_forward_seconds(self) -> float:
        """See `Engine.pop_forward_seconds`."""
        return self._own_time.take_s()

    def save(
        self, run_dir: Path, step: int, *, loop_state: Mapping[str, Any] | None = None, final: bool = True
    ) -> None:
        """See `Engine.save`."""
        mesh, zero = self._mesh, self._engine.zero_optimization_stage()
        layout = {"ranks": mesh.num_ranks, "tensor": mesh.tensor, "pipeline": mesh.pipeline, "zero": zero}
        config = self._run.model_dump(mode="json")
        info = CheckpointInfo(
            step, optimizer_steps(self._optimizer), layout, config, self._data, dict(loop_state or {})
        )
        self._saver.save(run_dir, info, self._fragments_to_write(), random_states(mesh.device), final=final)

    def latest_valid_checkpoint(self, run_dir: Path) -> Checkpoint | None:
        """See `Engine.latest_valid_checkpoint`."""
        self._saver.finish()
        return latest_valid_checkpoint(
            run_dir, lambda index: belongs_to_another_run(index, self._run, self._data), self._mesh, self.host
        )

    def load(self, folder: Path) -> dict[str, Any]:
        """See `Engine.load`."""
        self._saver.finish()
        reader = StateReader(folder)
        load_optimizer_state(self._engine.module, self._optimizer, reader)
        set_random_states(reader.random(self._mesh.rank), self._mesh.device)
        return reader.index.loop_state

    def _fragments_to_write(self) -> list[Fragment]:
        """What this rank has, without what another writes: of equal copies each rank writes a part."""
        mesh = self._mesh
        held = [f for f in fragments(self._engine.module, self._optimizer) if not f.is_copy]
        mine = [fragment for fragment in held if fragment.shard is not None or mesh.tensor_rank == 0]
        if is_sharded(self._optimizer):
            return mine
        return [fragment.part(mesh.replica_rank, mesh.replica_ranks) for fragment in mine]

    def check_replicas(self, step: int) -> None:
        """See `Engine.check_replicas`."""
        weights, checks = dict(self._engine.module.named_parameters()), []
        if self._tensor_group is not None:
            full = {name: p for name, p in weights.items() if shard_of(p) is None}
            held = [f for f in fragments(self._engine.module, self._optimizer) if f.shard is None]
            alike = {f"{name} (compute weight)": getattr(p, "ds_tensor", p) for name, p in full.items()}
            alike |= {f"{f.name} ({kind})": tensor for f in held for kind, tensor in f.state.items()}
            checks.append(Replicas("tensor-parallel ranks", self._tensor_group, alike))
        if self._engine.zero_optimization_stage() < 3:  # which holds no weight whole
            checks.append(Replicas("copies of the weights on ranks", self._engine.data_parallel_group, weights))
        check_replicas(checks, step)

    def close(self) -> None:
        """See `Engine.close`."""
        self._saver.finish()
        self._engine.destroy()
        dist.destroy_process_group()

    def _set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def _grad_norm(self) -> Tensor | float:
        norm: Tensor | float | None = self._plain.norm if self._plain else self._engine.get_global_grad_norm()
        assert norm is not None  # after a step
        return norm
