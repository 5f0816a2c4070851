"""What tensor-parallel ranks tell each other, forward and backward.

Each function is the adjoint of another, so that autograd gives every rank the gradient that one process would have.

    forward                            backward
    to_ranks    the tensor as it is    sum over ranks
    from_ranks  sum over ranks         the gradient as it is
    gather      all ranks' tokens      own tokens of the sum over ranks
    scatter     own tokens of the sum  all ranks' tokens

B batch · T positions · D width (lower case: this rank's share)
"""

from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed import ProcessGroup

TOKENS_DIM = 1
# Names before and from torch 2.13 on.
_all_gather_op = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter_op = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor


def to_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """Hand a tensor that all ranks hold alike to layers that are split."""
    return _ToRanks.apply(x, group)  # type: ignore[no-untyped-call]


def from_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of what the ranks of a split layer give."""
    return _FromRanks.apply(x, group)  # type: ignore[no-untyped-call]


def gather(x_BtD: Tensor, group: ProcessGroup) -> Tensor:
    """All positions, from ranks that hold a run of them each: [B, t, D] -> [B, T, D]."""
    return _Gather.apply(x_BtD, group)  # type: ignore[no-untyped-call]


def scatter(x_BTD: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's run of positions of the sum over ranks: [B, T, D] -> [B, t, D]."""
    return _Scatter.apply(x_BTD, group)  # type: ignore[no-untyped-call]


def own_tokens(x_BT: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's run of positions of something that all ranks hold alike; no gradient, no communication."""
    return x_BT.chunk(group.size(), dim=TOKENS_DIM)[group.rank()]


def all_reduce(x: Tensor, op: str, group: ProcessGroup) -> Tensor:
    """The sum ("sum") or largest ("max") over ranks; `x` stays as it is."""
    return _waited(functional.all_reduce(x.contiguous(), op, group))


def _waited(x: Tensor) -> Tensor:
    done: Tensor = functional.wait_tensor(x)  # type: ignore[no-untyped-call]
    return done


def _all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    return _waited(_all_gather_op(x.contiguous(), TOKENS_DIM, group))


def _reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    return _waited(_reduce_scatter_op(x.contiguous(), "sum", TOKENS_DIM, group))


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


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group), None
