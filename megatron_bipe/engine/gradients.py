"""Gradients between backward and AdamW: sums over micro-batches and replicas, norm and clipping, all on the device.

DeepSpeed reads the gradient norm on the host to decide whether it makes the update, so that a GPU runs out of work at
every update. Here torch's fused AdamW decides on the device; the host reads the norm only when it is logged.

    precision, ZeRO stage      DeepSpeed's optimizer   what this module does
    fp32, 0                    none                    norm and clipping before AdamW's step
    bf16, 0                    FP16_UnfusedOptimizer   the same, and its `step`
    bf16, 1                    BF16_Optimizer          the same, and the sums over micro-batches and replicas
    bf16, 0, pipeline stages   BF16_Optimizer in bf16  nothing: DeepSpeed's update
    all others                 ZeRO 1 to 3             nothing, except `adapt_offload`
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from megatron_bipe.engine.deepspeed_internals import compute_weights_and_copies
from megatron_bipe.model import copy_source, shard_of
from megatron_bipe.parallel import Mesh

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13


class GradientClipper:
    """Norm, clipping and NaN check of gradients before each step of a fused AdamW.

    An update whose norm is not finite changes neither weights nor moments nor the number of steps: the optimizer skips
    it on the device, so that nothing waits for the norm.

    Args:
        optimizer: optimizer that gets a step pre-hook; DeepSpeed must not clip before it.
        clip: maximal norm; 0 disables clipping.
        squares: returns the sum of squares of the gradients that this rank counts, fp32 [], on the device.
        group: ranks over which `squares` is added up; None if there is only one.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clip: float,
        squares: Callable[[], Tensor],
        group: dist.ProcessGroup | None,
    ) -> None:
        self._clip, self._squares, self._group = clip, squares, group
        self.norm: Tensor | None = None
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        squares = self._squares()
        if self._group is not None:
            dist.all_reduce(squares, group=self._group)
        self.norm = squares.sqrt()
        optimizer.found_inf = 1 - self.norm.isfinite().float()  # type: ignore[attr-defined]  # read by fused AdamW
        if self._clip > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip, self.norm)


def make_clipper(
    optimizer: Any, clip: float, mesh: Mesh, model_group: dist.ProcessGroup | None
) -> GradientClipper | None:
    """Take over the update from DeepSpeed's optimizer where this module has its own; otherwise return None.

    Args:
        optimizer: DeepSpeed's optimizer, or torch's if DeepSpeed has none.
        clip: maximal norm; 0 disables clipping.
        mesh: this process among the ranks.
        model_group: ranks with parts of one model, over stages and tensor-parallel ranks; None if there is only one.
    """

    def clipper_of(adam: torch.optim.Optimizer, weights: Iterable[tuple[Tensor, Tensor]]) -> GradientClipper:
        counted = [holder for weight, holder in weights if _is_counted(weight, mesh)]

        def squares() -> Tensor:
            gradients = [holder.grad for holder in counted if holder.grad is not None]
            return torch.nn.utils.get_total_norm(gradients).to(mesh.device) ** 2

        return GradientClipper(adam, clip, squares, model_group)

    if isinstance(optimizer, torch.optim.Optimizer):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        return clipper_of(optimizer, zip(weights, weights, strict=True))
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.step = UnshardedUpdate(optimizer).step
        return clipper_of(optimizer.optimizer, compute_weights_and_copies(optimizer))
    if sums_in_fp32(optimizer):
        update = PartitionedUpdate(optimizer, mesh)
        optimizer.step, optimizer._update_hp_grad = update.step, update.add_gradient
        group = dist.group.WORLD if mesh.num_ranks > 1 else None
        return GradientClipper(optimizer.optimizer, clip, update.squares, group)
    return None


def sums_in_fp32(optimizer: Any) -> bool:
    """Return True for DeepSpeed's optimizer of bf16 with ZeRO 1; pipeline stages without ZeRO use it with bf16 sums."""
    return isinstance(optimizer, BF16_Optimizer) and optimizer.grad_acc_dtype is torch.float32


def _is_counted(weight: Tensor, mesh: Mesh) -> bool:
    """Return True if this rank counts the weight in the norm: a replicated weight is counted once."""
    return (mesh.tensor_rank == 0 or shard_of(weight) is not None) and not copy_source(weight)


class UnshardedUpdate:
    """The update of bf16 without ZeRO: AdamW on an fp32 copy of each weight.

    Args:
        optimizer: DeepSpeed's optimizer, which holds the copies.
    """

    def __init__(self, optimizer: FP16_UnfusedOptimizer) -> None:
        self._adam = optimizer.optimizer
        self._weights, self._copies = map(list, zip(*compute_weights_and_copies(optimizer), strict=True))

    @torch.no_grad()
    def step(self) -> None:
        for weight, copy in zip(self._weights, self._copies, strict=True):
            copy.grad = None if weight.grad is None else weight.grad.float()
        self._adam.step()
        for copy in self._copies:
            copy.grad = None
        torch._foreach_copy_(self._weights, self._copies)


class PartitionedUpdate:
    """The update of bf16 with ZeRO 1: each replica's rank updates its partition of the fp32 weights.

    DeepSpeed's optimizer keeps the tensors: per parameter group, one flat tensor of fp32 sums of gradients, of which
    rank r of R replicas gets the r-th of R equal parts, summed over replicas. It zeroes them after each update.

    Args:
        optimizer: DeepSpeed's optimizer, which has fp32 sums.
        mesh: this process among the ranks.
    """

    def __init__(self, optimizer: BF16_Optimizer, mesh: Mesh) -> None:
        self._optimizer, self._device, self._replicas = optimizer, mesh.device, mesh.replica_ranks
        self._group = optimizer.dp_process_group
        self._averages = mesh.device.type == "cuda"  # NCCL divides as it adds up; gloo cannot
        self._counted = [part for part, weight in self._parts(mesh.replica_rank) if _is_counted(weight, mesh)]

    def add_gradient(self, weight: Tensor, group: int, index: int, clear_lp_grads: bool) -> None:
        """Add a weight's bf16 gradient to its fp32 sum in one pass, without an fp32 copy of it."""
        del clear_lp_grads  # DeepSpeed releases the gradient afterwards
        if weight.grad is not None:
            sums = self._optimizer.fp32_groups_gradients[group][index]
            sums.add_(weight.grad.view(-1))
            weight._hp_grad = sums  # type: ignore[attr-defined]  # for tied weights, which pipeline stages add up

    @torch.no_grad()
    def step(self) -> None:
        """Average the gradients over replicas and update the weights; `GradientClipper` runs in between."""
        optimizer = self._optimizer
        partitions = optimizer.fp32_groups_gradient_flat_partition
        for master, sums, partition in zip(
            optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradients_flat, partitions, strict=True
        ):
            self._average(sums, partition)
            master.grad = partition
        optimizer.optimizer.step()
        optimizer.update_lp_params()

    def squares(self) -> Tensor:
        """Return the sum of squares of this rank's partition."""
        if not self._counted:
            return torch.zeros((), device=self._device)
        return torch.stack(torch._foreach_norm(self._counted)).square().sum()

    def _average(self, sums: Tensor, partition: Tensor) -> None:
        """Average a flat tensor over replicas, in place; only `partition`, this rank's part of it, gets the result."""
        if self._replicas == 1:
            return
        op = dist.ReduceOp.AVG if self._averages else dist.ReduceOp.SUM
        _reduce_scatter(partition, sums, op, self._group)
        if not self._averages:
            partition.mul_(1 / self._replicas)

    def _parts(self, replica: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield the part of each weight's gradient that is in a replica's partition, and the weight."""
        optimizer = self._optimizer
        for weights, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients_flat, strict=True):
            size, offset = sums.numel() // self._replicas, 0
            for weight in weights:
                start = max(offset, replica * size)
                stop = min(offset + weight.numel(), (replica + 1) * size)
                if start < stop:
                    yield sums[start:stop], weight
                offset += weight.numel()


def adapt_offload(optimizer: Any) -> None:
    """Adapt DeepSpeed's optimizer if it is that of ZeRO 1 or 2 with offload: one wait for all norms, and clean skips.

    After a skipped update, DeepSpeed keeps the fp32 sums of bf16 gradients, so that it would skip all later ones.

    DeepSpeed reads for each gradient whether it is finite, and its norm. The norms alone suffice: if a gradient is not
    finite, the norm is not either, and then it skips the update.
    """
    if not (isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.cpu_offload):
        return
    compute_norm = optimizer.complete_grad_norm_calculation_for_cpu_offload

    def compute_after_reading(parameters: list[Tensor]) -> Tensor:
        norms = optimizer.norm_for_param_grads
        if any(isinstance(norm, Tensor) for norm in norms.values()):
            values = torch.stack([*norms.values()]).cpu().numpy()
            optimizer.norm_for_param_grads = dict(zip(norms, values, strict=True))
        result: Tensor = compute_norm(parameters)
        return result

    optimizer.complete_grad_norm_calculation_for_cpu_offload = compute_after_reading
    optimizer.update_offload_overflow_tracker = lambda _: None
    reset_buffers = optimizer.reset_cpu_buffers  # called after each update and each skipped one

    def reset_with_sums() -> None:
        reset_buffers()
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    optimizer.reset_cpu_buffers = reset_with_sums
