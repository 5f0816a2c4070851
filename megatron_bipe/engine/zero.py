"""The plan as one sequence under DeepSpeed's data-parallel engine: ZeRO 0 to 3, one stage."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bipe.config.deepspeed import zero_stage
from megatron_bipe.config.schema import OptimizerConfig, RunConfig
from megatron_bipe.engine.api import StepResult
from megatron_bipe.engine.checkpoint import publish
from megatron_bipe.model.head import mean_loss
from megatron_bipe.model.plan import build_model
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.types import Batch

_log = logging.getLogger(__name__)


class ZeroEngine:
    """Implements `engine.api.Engine` with `deepspeed.initialize` over the whole model.

    Args:
        run: the run configuration, validated.
        ds_config: result of `config.deepspeed.engine_config`.
        mesh: this process among the ranks.
    """

    def __init__(self, run: RunConfig, ds_config: dict[str, Any], mesh: Mesh) -> None:
        self._mesh = mesh
        _quiet()
        deepspeed.init_distributed(dist_backend="nccl" if mesh.device.type == "cuda" else "gloo")
        if run.train.precision == "bf16" and zero_stage(ds_config) == 0:
            _log.warning("bf16 without ZeRO: DeepSpeed sums gradients in bf16; ds_configs/zero1.json uses fp32")
        model = build_model(run.model, run.train.seed)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(model, run.optimizer), config=ds_config, dist_init_required=False
        )

    def train_step(self, micro_batches: Iterable[Batch[Tensor]], lr: float) -> StepResult:
        """See `Engine.train_step`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for batch in micro_batches:
            loss = self._loss(batch)
            self._engine.backward(loss)
            losses.append(loss.detach())
            grad_norm = self._plain_grad_norm()
            self._engine.step()
        if grad_norm is None:
            grad_norm = self._engine.get_global_grad_norm()
        return StepResult(self._mean_over_ranks(torch.stack(losses).mean()), grad_norm)

    def eval_loss(self, batches: Iterable[Batch[Tensor]]) -> float:
        """See `Engine.eval_loss`."""
        self._engine.eval()
        with torch.no_grad():
            losses = torch.stack([self._loss(batch) for batch in batches])
        self._engine.train()
        return float(self._mean_over_ranks(losses.mean()))

    def save(self, run_dir: Path, step: int) -> Path:
        """See `Engine.save`."""

        def write(folder: Path) -> None:
            self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

        return publish(run_dir, step, write, self._mesh.is_main, dist.barrier)

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        self._engine.load_checkpoint(str(folder.parent), tag=folder.name)

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.destroy()
        dist.destroy_process_group()

    def _loss(self, batch: Batch[Tensor]) -> Tensor:
        tokens, intra, inter, labels = (ids.to(self._mesh.device, non_blocking=True) for ids in batch)
        return mean_loss(self._engine((tokens, intra, inter)), labels)

    def _plain_grad_norm(self) -> Tensor | None:
        """Norm of the reduced gradients in the one case where DeepSpeed does not keep it: fp32 without ZeRO."""
        engine = self._engine
        if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
            return None
        if not engine.is_gradient_accumulation_boundary():
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value / self._mesh.num_ranks


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused AdamW; matrices and tables decay, norm weights do not."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def _quiet() -> None:
    """Keep DeepSpeed from announcing what works, and from compiling a collective that only inference uses.

    On a CPU it would build that shared-memory operator at every first start on a machine, for about a minute.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
