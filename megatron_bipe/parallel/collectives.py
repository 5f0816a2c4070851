"""Collectives between ranks: differentiable ones for sharded layers and sequences, and those of plain data.

Each differentiable function is the adjoint of another, so that autograd gives every rank the gradient that one process
would compute.

    forward                            backward
    to_ranks    identity               sum over ranks
    from_ranks  sum over ranks         identity
    scatter     own tokens of the sum  all ranks' tokens
    gather      all ranks' columns     own columns of the sum

`split_linear` is a matrix product preceded by `to_ranks` or by an all-gather.

B batch · T positions · D width · R ranks · X remaining dimensions (lower case: this rank's shard)
"""

import json
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

TOKENS_DIM = 1
# torch 2.13 renamed these functions.
_all_gather_op = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter_op = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor


def copy_to_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """Pass a tensor that is replicated on all ranks to sharded layers."""
    return _ToRanks.apply(x, group)  # type: ignore[no-untyped-call]


def reduce_from_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum the outputs of a sharded layer over its ranks."""
    return _FromRanks.apply(x, group)  # type: ignore[no-untyped-call]


def column_parallel_linear(hidden: Tensor, weight_fD: Tensor, group: ProcessGroup, sequence: bool) -> Tensor:
    """Return this rank's shard of y = x W^T, for which every rank needs all of x.

    Backward sums the partial gradients of x over ranks, overlapped with the computation of the weight gradient.

    Args:
        hidden: x [B, T, D]; if the positions are sharded, x [B, t, D] is gathered and its gradient reduce-scattered.
        weight_fD: this rank's rows of W.
        group: the ranks that shard W.
        sequence: True if the positions are sharded.
    """
    return _SplitLinear.apply(hidden, weight_fD, group, sequence)  # type: ignore[no-untyped-call]


def scatter(x_BTD: Tensor, group: ProcessGroup) -> Tensor:
    """Return this rank's contiguous slice of positions of the sum over ranks: [B, T, D] -> [B, t, D]."""
    return _Scatter.apply(x_BTD, group)  # type: ignore[no-untyped-call]


def gather_columns(x_BTf: Tensor, group: ProcessGroup) -> Tensor:
    """Return the outputs of a column-parallel layer on all ranks: [B, T, f] -> [B, T, F]."""
    return _GatherColumns.apply(x_BTf, group)  # type: ignore[no-untyped-call]


def own_tokens(x_BT: Tensor, group: ProcessGroup) -> Tensor:
    """Return this rank's slice of positions of a replicated tensor, without gradient or communication."""
    return x_BT.chunk(group.size(), dim=TOKENS_DIM)[group.rank()]


def all_reduce(x: Tensor, op: str, group: ProcessGroup) -> Tensor:
    """Return the sum ("sum") or maximum ("max") over ranks; `x` is not modified."""
    return _waited(_start_all_reduce(x, op, group))


def all_to_all(x_RX: Tensor, group: ProcessGroup) -> Tensor:
    """Exchange parts: element r of the result is from rank r, which had it at this rank's index."""
    return _waited(functional.all_to_all_single(x_RX.contiguous(), None, None, group))


def all_gather_json(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Return the JSON values of all ranks of a group (None: of the launch), by rank.

    torch's collectives of objects unpickle what they receive, so that any process that reaches the port of a rank could
    run code there.
    """
    data = _json_bytes(value).to(_device_of(group))
    sizes = [data.new_zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, sizes[0].new_tensor([len(data)]), group=group)
    padded = F.pad(data, (0, int(max(sizes)) - len(data)))
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return [_parsed(part[: int(size)]) for part, size in zip(gathered, sizes, strict=True)]


def broadcast_json(value: Any, group: ProcessGroup | None = None) -> Any:
    """Return the JSON value of the first rank of the launch; see `all_gather_json`."""
    data = _json_bytes(value).to(_device_of(group))
    size = data.new_tensor([len(data)], dtype=torch.int64)
    dist.broadcast(size, 0, group=group)
    sent = data if dist.get_rank() == 0 else data.new_empty(int(size))
    dist.broadcast(sent, 0, group=group)
    return _parsed(sent)


def _json_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _parsed(data_B: Tensor) -> Any:
    return json.loads(data_B.cpu().numpy().tobytes())


def _device_of(group: ProcessGroup | None) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _start_all_reduce(x: Tensor, op: str, group: ProcessGroup) -> Tensor:
    return functional.all_reduce(x.contiguous(), op, group)


def _start_reduce_scatter(x: Tensor, op: str, group: ProcessGroup, dim: int = TOKENS_DIM) -> Tensor:
    started: Tensor = _reduce_scatter_op(x.contiguous(), op, dim, group)
    return started


def _waited(x: Tensor) -> Tensor:
    done: Tensor = functional.wait_tensor(x)
    return done


def _all_gather(x: Tensor, group: ProcessGroup, dim: int = TOKENS_DIM) -> Tensor:
    return _waited(_all_gather_op(x.contiguous(), dim, group))


def _reduce_scatter(x: Tensor, group: ProcessGroup, dim: int = TOKENS_DIM) -> Tensor:
    return _waited(_start_reduce_scatter(x, "sum", group, dim))


class _ToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, "sum", ctx.group), None


class _FromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        del ctx
        return all_reduce(x, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grad, None


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_fD: Tensor, group: ProcessGroup, sequence: bool) -> Tensor:
        hidden_BTD = _all_gather(hidden, group) if sequence else hidden
        ctx.save_for_backward(hidden_BTD, weight_fD)
        ctx.group, ctx.sequence = group, sequence
        return F.linear(hidden_BTD, weight_fD)

    @staticmethod
    def backward(ctx: Any, grad_BTf: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_BTD, weight_fD = ctx.saved_tensors
        start = _start_reduce_scatter if ctx.sequence else _start_all_reduce
        pending = start(grad_BTf @ weight_fD, "sum", ctx.group)
        grad_fD = grad_BTf.flatten(0, 1).T @ hidden_BTD.flatten(0, 1)
        return _waited(pending), grad_fD, None, None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group, x.ndim - 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group, grad.ndim - 1), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group), None
