"""Context parallelism (DeepSpeed-Ulysses), for sequences whose activations do not fit on one rank.

Each rank holds a contiguous slice of a sequence's positions and performs all token-wise work for them. Before attention
ranks exchange the slices for full sequences of some heads, and reverse this afterwards: one all-to-all for queries,
keys and values together, one for the output. Attention is therefore the same causal attention as on one rank, encodes
the ids of full sequences, and the load is equal on all ranks.

B batch · T positions · G head groups · X remaining dimensions (lower case: this rank's shard)
Source: Jacobs et al. 2023 (DeepSpeed-Ulysses, arXiv 2309.14509).
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_bipe.parallel.collectives import TOKENS_DIM, all_to_all, own_tokens


class UlyssesExchange:
    """The `HeadExchange` of context parallelism: an all-to-all over the ranks of a group."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.rank, self.ranks = group.rank(), group.size()

    def local_positions(self, ids_BT: Tensor) -> Tensor:
        return own_tokens(ids_BT, self._group)

    def to_heads(self, x_BtGX: Tensor) -> Tensor:
        return to_heads(x_BtGX, self._group)

    def to_tokens(self, x_BTgX: Tensor) -> Tensor:
        return to_tokens(x_BTgX, self._group)


def to_heads(x_BtGX: Tensor, group: ProcessGroup) -> Tensor:
    """Exchange some positions of all head groups for all positions of some: [B, t, G, ...] -> [B, T, g, ...]."""
    return _ToHeads.apply(x_BtGX, group)  # type: ignore[no-untyped-call]


def to_tokens(x_BTgX: Tensor, group: ProcessGroup) -> Tensor:
    """Exchange all positions of some head groups for some positions of all: [B, T, g, ...] -> [B, t, G, ...]."""
    return _ToTokens.apply(x_BTgX, group)  # type: ignore[no-untyped-call]


def _heads_from_ranks(x_BtGX: Tensor, group: ProcessGroup) -> Tensor:
    by_rank_RBtgX = torch.stack(x_BtGX.chunk(group.size(), dim=2))
    return all_to_all(by_rank_RBtgX, group).movedim(0, 1).flatten(1, 2)


def _tokens_from_ranks(x_BTgX: Tensor, group: ProcessGroup) -> Tensor:
    by_rank_RBtgX = torch.stack(x_BTgX.chunk(group.size(), dim=TOKENS_DIM))
    return all_to_all(by_rank_RBtgX, group).movedim(0, 2).flatten(2, 3)


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
