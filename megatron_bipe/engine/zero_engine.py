"""The plan as one sequential module under DeepSpeed's standard engine: ZeRO 0 to 3, no pipeline."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from megatron_bipe.config.deepspeed import zero_stage
from megatron_bipe.config.schema import RunConfig
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.engine.base import (
    DeepSpeedEngine,
    check_precision,
    make_grid,
    make_layers,
    mean_loss,
    on_device,
    start_deepspeed,
)
from megatron_bipe.engine.interface import StepResult
from megatron_bipe.model.transformer import build_model
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.types import Batch

_log = logging.getLogger(__name__)


class ZeroEngine(DeepSpeedEngine):
    """An `engine.interface.Engine` over the full model in one stage; `start_engine` documents its arguments."""

    def __init__(self, run: RunConfig, ds_config: dict[str, Any], mesh: Mesh, data: DataRecord | None = None) -> None:
        self._mesh, self._data = mesh, data
        start_deepspeed(mesh, run.parallel.timeout_s)
        check_precision(mesh, run)
        if run.train.precision == "bf16" and zero_stage(ds_config) == 0:
            _log.warning("bf16 without ZeRO: DeepSpeed sums gradients in bf16; with ds_configs/zero1.json it uses fp32")
        self._layers, self._tensor_group = make_layers(mesh)
        grid = make_grid(mesh) if mesh.tensor > 1 else None
        self._initialize(self._build(run), run, ds_config, grid.get_slice_parallel_group() if grid else None, grid)

    def _build(self, run: RunConfig) -> nn.Module:
        return build_model(run.model, run.train.seed, self._layers, run.parallel.recompute)

    def train_step(self, micro_batches: Iterable[Batch[Tensor]], lr: float) -> StepResult:
        self._set_lr(lr)
        losses = []
        for batch in micro_batches:
            with record_function("forward"):
                loss = self._loss(batch)
            self._engine.backward(loss)
            losses.append(loss.detach())
            self._engine.step()
        return StepResult(self._mean_over_ranks(torch.stack(losses).mean()), self._grad_norm())

    def eval_loss(self, batches: Iterable[Batch[Tensor]]) -> float:
        self._engine.eval()
        with torch.no_grad():
            losses = torch.stack([self._loss(batch) for batch in batches])
        self._engine.train()
        return float(self._mean_over_ranks(losses.mean()))

    def _loss(self, batch: Batch[Tensor]) -> Tensor:
        tokens, intra, inter, labels, weights = on_device(batch, self._mesh.device)
        losses = self._layers.token_losses(self._engine((tokens, intra, inter)), labels)
        return mean_loss(losses, None if weights is None else self._layers.exchange.own(weights))

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value / self._mesh.num_ranks
