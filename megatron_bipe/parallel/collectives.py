"""What ranks that share layers or windows tell each other, forward and backward.

Each function is the adjoint of another, so that autograd gives every rank the gradient that one process would have.

    forward                            backward
    to_ranks    the tensor as it is    sum over ranks
    from_ranks  sum over ranks         the gradient as it is
    scatter     own tokens of the sum  all ranks' tokens
    to_heads    all tokens, own heads  own tokens, all heads
    to_tokens   own tokens, all heads  all tokens, own heads

and `split_linear` is a matrix product with `to_ranks`, or with a gather, before it.

B batch · T positions · D width · G head groups · X more (lower case: this rank's share)
"""

from typing import Any

import torch
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
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


def split_linear(hidden: Tensor, weight_fD: Tensor, group: ProcessGroup, sequence: bool) -> Tensor:
    """This rank's share of y = x W^T, where all ranks see all of x.

    Backward, the ranks sum what each has of the gradient of x; meanwhile each computes that of its weight.

    Args:
        hidden: x [B, T, D]; where the positions are split [B, t, D], which is gathered, and its gradient scattered.
        weight_fD: this rank's rows of W.
        group: the ranks that have the others.
        sequence: whether the positions are split.
    """
    return _SplitLinear.apply(hidden, weight_fD, group, sequence)  # type: ignore[no-untyped-call]


def scatter(x_BTD: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's run of positions of the sum over ranks: [B, T, D] -> [B, t, D]."""
    return _Scatter.apply(x_BTD, group)  # type: ignore[no-untyped-call]


def to_heads(x_BtGX: Tensor, group: ProcessGroup) -> Tensor:
    """From own positions of all head groups to all positions of own ones: [B, t, G, ...] -> [B, T, g, ...]."""
    return _ToHeads.apply(x_BtGX, group)  # type: ignore[no-untyped-call]


def to_tokens(x_BTgX: Tensor, group: ProcessGroup) -> Tensor:
    """From all positions of own head groups to own positions of all: [B, T, g, ...] -> [B, t, G, ...]."""
    return _ToTokens.apply(x_BTgX, group)  # type: ignore[no-untyped-call]


def own_tokens(x_BT: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's run of positions of something that all ranks hold alike; no gradient, no communication."""
    return x_BT.chunk(group.size(), dim=TOKENS_DIM)[group.rank()]


def all_reduce(x: Tensor, op: str, group: ProcessGroup) -> Tensor:
    """The sum ("sum") or largest ("max") over ranks; `x` stays as it is."""
    return _waited(_start_all_reduce(x, op, group))


def _start_all_reduce(x: Tensor, op: str, group: ProcessGroup) -> Tensor:
    return functional.all_reduce(x.contiguous(), op, group)


def _start_reduce_scatter(x: Tensor, op: str, group: ProcessGroup) -> Tensor:
    started: Tensor = _reduce_scatter_op(x.contiguous(), op, TOKENS_DIM, group)
    return started


def _waited(x: Tensor) -> Tensor:
    done: Tensor = functional.wait_tensor(x)  # type: ignore[no-untyped-call]
    return done


def _all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    return _waited(_all_gather_op(x.contiguous(), TOKENS_DIM, group))


def _reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    return _waited(_start_reduce_scatter(x, "sum", group))


def _heads_from_ranks(x_BtGX: Tensor, group: ProcessGroup) -> Tensor:
    by_rank_RBtgX = torch.stack(x_BtGX.chunk(group.size(), dim=2))
    return _all_to_all(by_rank_RBtgX, group).movedim(0, 1).flatten(1, 2)


def _tokens_from_ranks(x_BTgX: Tensor, group: ProcessGroup) -> Tensor:
    by_rank_RBtgX = torch.stack(x_BTgX.chunk(group.size(), dim=TOKENS_DIM))
    return _all_to_all(by_rank_RBtgX, group).movedim(0, 2).flatten(2, 3)


def _all_to_all(x_RX: Tensor, group: ProcessGroup) -> Tensor:
    """The r-th part of the result is from rank r, what it had for this rank."""
    return _waited(functional.all_to_all_single(x_RX.contiguous(), None, None, group))


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
        under_way = start(grad_BTf @ weight_fD, "sum", ctx.group)
        grad_fD = grad_BTf.flatten(0, 1).T @ hidden_BTD.flatten(0, 1)
        return _waited(under_way), grad_fD, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group), None


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _heads_from_ranks(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _tokens_from_ranks(grad, ctx.group), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _tokens_from_ranks(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _heads_from_ranks(grad, ctx.group), None
