"""The two engines, which run the model's list of layers (the plan), and the choice between them.

ZeroEngine       one sequential module under DeepSpeed's standard engine: ZeRO 0 to 3, no pipeline
PipelineEngine   pipeline stages under DeepSpeed's pipeline engine: ZeRO 0 and 1
"""

import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.profiler import record_function

from megatron_bipe.config import RunConfig, zero_stage
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.engine.base import (
    DeepSpeedEngine,
    check_precision,
    loss_sums,
    make_grid,
    make_topology,
    mean_loss,
    on_device,
    position_parts,
    start_deepspeed,
    suppress_stdout,
)
from megatron_bipe.engine.interface import Engine, LossSums, StepResult
from megatron_bipe.model import TOKEN_EMBEDDING, LayerFactory, LayerPlan, build_model, copy_source, make_plan
from megatron_bipe.parallel import Mesh, end_stages_group, partition_layers
from megatron_bipe.types import Batch

_log = logging.getLogger(__name__)


def start_engine(run: RunConfig, ds_config: dict[str, Any], mesh: Mesh, data: DataRecord | None = None) -> Engine:
    """Start the engine of this rank; waits for all ranks.

    Args:
        run: the validated run configuration.
        ds_config: result of `config.deepspeed.engine_config`.
        mesh: this rank's coordinates.
        data: record of the training data, stored in checkpoints.
    """
    kind = PipelineEngine if mesh.pipeline > 1 else ZeroEngine
    return kind(run, ds_config, mesh, data)


class ZeroEngine(DeepSpeedEngine):
    """An `engine.interface.Engine` over the full model in one stage; `start_engine` documents its arguments."""

    def __init__(self, run: RunConfig, ds_config: dict[str, Any], mesh: Mesh, data: DataRecord | None = None) -> None:
        self._mesh, self._data = mesh, data
        start_deepspeed(mesh, run.parallel.timeout_s)
        check_precision(mesh, run)
        if run.train.precision == "bf16" and zero_stage(ds_config) == 0:
            _log.warning("bf16 without ZeRO: DeepSpeed sums gradients in bf16; with ds_configs/zero1.json it uses fp32")
        self._layers = self._make_layers(run, ds_config)
        grid = make_grid(mesh) if mesh.tensor > 1 else None
        self._initialize(self._build(run), run, ds_config, grid.get_slice_parallel_group() if grid else None, grid)

    def _build(self, run: RunConfig) -> nn.Module:
        return build_model(run.model, run.train.seed, self._layers, run.parallel.recompute)

    def train_step(self, micro_batches: Iterable[Batch[Tensor]], lr: float) -> StepResult:
        self._set_lr(lr)
        losses = []
        for batch in micro_batches:
            with record_function("forward"):
                loss = mean_loss(*self._losses(batch))
            self._engine.backward(loss)
            losses.append(loss.detach())
            self._engine.step()
        return StepResult(self._mean_over_ranks(torch.stack(losses).mean()), self._grad_norm())

    def eval_loss(self, batches: Iterable[Batch[Tensor]]) -> LossSums:
        self._engine.eval()
        local, sums = self._layers.exchange.local_positions, []
        with torch.no_grad():
            for batch in batches:
                losses = self._losses(batch)
                parts = position_parts(batch.labels_BT).to(self._mesh.device)
                sums.append(loss_sums(*losses, local(parts)))
        self._engine.train()
        return self._held_out(sums)

    def _losses(self, batch: Batch[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the losses of this rank's tokens, and their weights."""
        tokens, intra, inter, labels, weights = on_device(batch, self._mesh.device)
        losses = self._layers.token_losses(self._engine((tokens, intra, inter)), labels)
        return losses, None if weights is None else self._layers.exchange.local_positions(weights)

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value / self._mesh.num_ranks


class PipelineEngine(DeepSpeedEngine):
    """An `engine.interface.Engine` with a `PipelineModule` over the plan; `start_engine` documents its arguments."""

    def __init__(self, run: RunConfig, ds_config: dict[str, Any], mesh: Mesh, data: DataRecord | None = None) -> None:
        self._mesh, self._data = mesh, data
        start_deepspeed(mesh, run.parallel.timeout_s)
        check_precision(mesh, run)
        layers = self._make_layers(run, ds_config)
        plan = make_plan(run.model, run.train.seed, layers, run.parallel.recompute)
        bounds = partition_layers(run.model, run.train.seq_len_tokens, mesh.pipeline)
        module = _Stages(plan, bounds, layers, mesh, run.model.tied_output)
        if mesh.sequence:  # tensor-parallel ranks hold different positions, so DeepSpeed must not partition payloads
            ds_config = ds_config | {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}
        self._stages = module
        self._initialize(module, run, ds_config, module.mpu().get_model_parallel_group())

    def train_step(self, micro_batches: Iterable[Batch[Tensor]], lr: float) -> StepResult:
        self._set_lr(lr)
        loss = self._engine.train_batch(self._payloads(micro_batches))
        self._engine.timers("train_batch").reset()  # DeepSpeed keeps the events of every step otherwise
        return StepResult(loss, self._grad_norm())

    def eval_loss(self, batches: Iterable[Batch[Tensor]]) -> LossSums:
        self._stages.held_out_sums.clear()
        for _, group in itertools.groupby(batches, key=lambda batch: batch.tokens_BT.shape):
            same_shape = list(group)  # stages assume one shape until it is reset
            self._engine.reset_activation_shape()
            self._engine.eval_batch(self._payloads(same_shape), num_micro_batches=len(same_shape), bcast_loss=False)
        self._engine.reset_activation_shape()
        self._engine.module.train()
        return self._held_out(self._stages.held_out_sums)

    def _payloads(self, batches: Iterable[Batch[Tensor]]) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """Yield the inputs of the first stage, (tokens, intra, inter), and of the last: labels and optional weights."""
        for batch in batches:
            tokens, intra, inter, labels, weights = on_device(batch, self._mesh.device)
            yield (tokens, intra, inter), (labels,) if weights is None else (labels, weights)


class _Stages(PipelineModule):  # type: ignore[misc]
    """The layers of this rank's stage; `bounds` contains the first layer of each stage and the end of the last."""

    def __init__(
        self, plan: list[LayerPlan], bounds: list[int], layers: LayerFactory, mesh: Mesh, tied_output: bool
    ) -> None:
        self._bounds = bounds
        held_out_sums: list[Tensor] = []  # results of `loss_sums` in evaluation, on ranks of the last stage

        def loss(logits_BTv: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
            labels_BT, *weights = labels
            with record_function("forward"):
                local = layers.exchange.local_positions
                losses_Bt = layers.token_losses(logits_BTv, labels_BT)
                weights_Bt = local(weights[0]) if weights else None
                if not torch.is_grad_enabled():
                    held_out_sums.append(loss_sums(losses_Bt, weights_Bt, local(position_parts(labels_BT))))
                return mean_loss(losses_Bt, weights_Bt)

        with suppress_stdout():
            super().__init__([_PlannedLayer(layer) for layer in plan], topology=make_topology(mesh), loss_fn=loss)
        self.held_out_sums = held_out_sums
        embeddings = [p for name, p in self.named_parameters() if TOKEN_EMBEDDING in (name, copy_source(p))]
        group = end_stages_group(mesh) if tied_output else None
        self._tied = [(embedding, group) for embedding in embeddings if group is not None]
        for embedding in filter(copy_source, embeddings):
            embedding.ds_pipe_replicated = True  # counted once in the gradient norm

    def forward(self, payload: Any) -> Any:
        with record_function("forward"):
            return super().forward(payload)

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, ProcessGroup]]:
        """Return the weights whose gradients DeepSpeed sums over stages before it reduces them over replicas."""
        return self._tied

    def _partition_layers(self, method: str = "") -> None:
        """Replace DeepSpeed's partitioning, which would build every layer to count its parameters."""
        del method
        self.parts = self._bounds
        self._set_bounds(self._bounds[self.stage_id], self._bounds[self.stage_id + 1])


class _PlannedLayer(LayerSpec):  # type: ignore[misc]
    """A DeepSpeed layer specification that builds a layer of the plan."""

    def __init__(self, layer: LayerPlan) -> None:
        super().__init__(nn.Module)
        self._layer = layer

    def build(self, log: bool = False) -> nn.Module:
        """Build the layer; DeepSpeed calls this only on the ranks of its stage."""
        del log
        return self._layer.build()
