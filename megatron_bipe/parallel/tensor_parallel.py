"""Tensor parallelism: the factory of layers that are sharded over ranks, and the loss over a sharded vocabulary.

With sequence parallelism the residual stream, and all token-wise computation on it, is sharded along the positions.
Tensor-parallel layers then all-gather their input and reduce-scatter their output, instead of all-reducing it.
Replicated weights (norms, the intra-segment embedding) see only some of the tokens, so their gradients are summed over
ranks.

B batch · T positions · K tokens · D width · F inner width · V vocabulary (lower case: this rank's shard)

Source: Shoeybi et al. 2019 (arXiv 1909.08053); Korthikanti et al. 2022 (arXiv 2205.05198).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_bipe.config import ModelConfig
from megatron_bipe.model import (
    HeadExchange,
    LossPasses,
    NoExchange,
    RMSNorm,
    RowSums,
    Shard,
    count_parameters,
    highest_logits,
    loss_passes,
    rms_norm,
)
from megatron_bipe.parallel.collectives import (
    all_reduce,
    column_parallel_linear,
    copy_to_ranks,
    gather_columns,
    own_tokens,
    reduce_from_ranks,
    scatter,
)


@dataclass(frozen=True)
class ShardGroup:
    """Group over which layers are sharded; `sequence` shards the residual stream along the positions, too."""

    group: ProcessGroup
    sequence: bool = False

    def reduce_output(self, partial: Tensor) -> Tensor:
        """Reduce the partial outputs of a sharded layer into the residual stream."""
        return scatter(partial, self.group) if self.sequence else reduce_from_ranks(partial, self.group)

    def prepare_replicated(self, weight: Tensor) -> Tensor:
        """Prepare a replicated weight for use on this rank's shard of the residual stream."""
        return copy_to_ranks(weight, self.group) if self.sequence else weight


class TensorParallelLayers:
    """A `LayerFactory` of layers that are sharded over a group."""

    def __init__(
        self,
        group: ProcessGroup,
        sequence: bool = False,
        exchange: HeadExchange | None = None,
        *,
        compiles: bool = False,
    ) -> None:
        self._shard_group = ShardGroup(group, sequence)
        self.exchange, self.compiles = exchange or NoExchange(), compiles
        self.rank, self.ranks = group.rank(), group.size()

    def column(self, width_in: int, width_out: int, blocks: int = 1) -> nn.Module:
        return ColumnParallelLinear(width_in, width_out, blocks, self._shard_group)

    def gather_columns(self, x_BTf: Tensor) -> Tensor:
        return gather_columns(x_BTf, self._shard_group.group)

    def row(self, width_in: int, width_out: int) -> nn.Module:
        return RowParallelLinear(width_in, width_out, self._shard_group)

    def vocab_embedding(self, rows: int, width: int, padding_row: int | None) -> nn.Module:
        return VocabParallelEmbedding(rows, width, padding_row, self._shard_group)

    def replicated_embedding(self, rows: int, width: int, padding_row: int | None) -> nn.Module:
        return ReplicatedEmbedding(rows, width, padding_row, self._shard_group)

    def local_sequence_ids(self, ids_Bt: Tensor) -> Tensor:
        return own_tokens(ids_Bt, self._shard_group.group) if self._shard_group.sequence else ids_Bt

    def per_head_embedding(self, rows: int, num_heads: int) -> nn.Module:
        return PerHeadEmbedding(rows, num_heads, self._shard_group)

    def norm(self, width: int, eps: float) -> nn.Module:
        return ReplicatedNorm(width, eps, self._shard_group)

    def output(self, width_in: int, rows: int) -> nn.Module:
        return ColumnParallelLinear(width_in, rows, 1, self._shard_group)

    def token_losses(self, logits_Btv: Tensor, labels_BT: Tensor) -> Tensor:
        labels_Bt = self.exchange.local_positions(labels_BT)
        return token_losses(logits_Btv, labels_Bt, self._shard_group.group, compiles=self.compiles)


def parameters_of_rank(config: ModelConfig, ranks: int) -> list[int]:
    """Return the number of parameters of each layer of the plan on one of `ranks` tensor-parallel ranks."""
    return count_parameters(config, TensorParallelLayers(cast(ProcessGroup, _NoGroup(ranks))))


class _NoGroup(NamedTuple):
    """A stand-in, without processes, for the group that the constructors of layers require."""

    ranks: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return 0


class ColumnParallelLinear(nn.Linear):
    """y = x W^T with W sharded by rows: every rank has the full x and computes its shard of y."""

    def __init__(self, width_in: int, width_out: int, blocks: int, shard_group: ShardGroup) -> None:
        super().__init__(width_in, width_out // shard_group.group.size(), bias=False)
        self._shard_group = shard_group
        mark_shard(self.weight, Shard(0, blocks, shard_group.group.rank(), shard_group.group.size()))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Map [B, T, D] or [B, t, D] to this rank's shard of the output, [B, T, ...]."""
        return column_parallel_linear(hidden_BTD, self.weight, self._shard_group.group, self._shard_group.sequence)


class RowParallelLinear(nn.Linear):
    """y = x W^T with a sharded x: the partial outputs of the ranks are summed."""

    def __init__(self, width_in: int, width_out: int, shard_group: ShardGroup) -> None:
        super().__init__(width_in // shard_group.group.size(), width_out, bias=False)
        self._shard_group = shard_group
        mark_shard(self.weight, Shard(1, 1, shard_group.group.rank(), shard_group.group.size()))

    def forward(self, inner_BTf: Tensor) -> Tensor:
        """Map this rank's shard of the input, [B, T, ...], to [B, T, D] or [B, t, D]."""
        return self._shard_group.reduce_output(F.linear(inner_BTf, self.weight))


class VocabParallelEmbedding(nn.Embedding):
    """A token embedding sharded by rows: each rank looks up the ids in its shard, and the results are summed."""

    def __init__(self, rows: int, width: int, padding_row: int | None, shard_group: ShardGroup) -> None:
        ranks, here = shard_group.group.size(), rows // shard_group.group.size()
        self._first = shard_group.group.rank() * here
        padding = None if padding_row is None else padding_row % rows - self._first
        super().__init__(here, width, padding_idx=padding if padding is not None and 0 <= padding < here else None)
        self._shard_group = shard_group
        mark_shard(self.weight, Shard(0, 1, shard_group.group.rank(), ranks))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Map ids of the full vocabulary [B, T] to [B, T, D] or [B, t, D]."""
        local_BT = tokens_BT - self._first
        mine_BT = (local_BT >= 0) & (local_BT < self.num_embeddings)
        found_BTD = super().forward(local_BT.where(mine_BT, 0))
        return self._shard_group.reduce_output(found_BTD * mine_BT[..., None])


class ReplicatedEmbedding(nn.Embedding):
    """An embedding that is replicated on every rank."""

    def __init__(self, rows: int, width: int, padding_row: int | None, shard_group: ShardGroup) -> None:
        super().__init__(rows, width, padding_idx=padding_row)
        self._shard_group = shard_group

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Map [B, T] to [B, T, D], or to [B, t, D] for this rank's positions."""
        if self._shard_group.sequence:
            ids_BT = own_tokens(ids_BT, self._shard_group.group)
        return F.embedding(ids_BT, self._shard_group.prepare_replicated(self.weight), self.padding_idx)


class PerHeadEmbedding(nn.Embedding):
    """An embedding with one column per head, sharded by columns."""

    def __init__(self, rows: int, num_heads: int, shard_group: ShardGroup) -> None:
        ranks = shard_group.group.size()
        super().__init__(rows, num_heads // ranks)
        mark_shard(self.weight, Shard(1, 1, shard_group.group.rank(), ranks))


class ReplicatedNorm(RMSNorm):
    """A norm whose weight is replicated on every rank."""

    def __init__(self, width: int, eps: float, shard_group: ShardGroup) -> None:
        super().__init__(width, eps)
        self._shard_group = shard_group

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return rms_norm(hidden_BTD, self._shard_group.prepare_replicated(self.weight), self.eps)


def mark_shard(weight: Tensor, shard: Shard) -> None:
    """Record how a parameter is sharded; DeepSpeed's gradient norm reads `tensor_model_parallel`."""
    weight.shard = shard  # type: ignore[attr-defined]
    weight.tensor_model_parallel = True  # type: ignore[attr-defined]


def token_losses(logits_BTv: Tensor, labels_BT: Tensor, group: ProcessGroup, *, compiles: bool = False) -> Tensor:
    """Return the cross-entropy in nats of every token, fp32 [B, T], the same on every rank.

    Backward overwrites the logits with their gradient.

    Args:
        logits_BTv: logits of this rank's contiguous shard of the vocabulary; all shards have the same size.
        labels_BT: ids of the full vocabulary.
        group: ranks that shard the vocabulary, in its order.
        compiles: selects the compiled passes over the logits.
    """
    columns_K = labels_BT.flatten() - group.rank() * logits_BTv.shape[-1]
    logits_Kv, passes = logits_BTv.flatten(0, -2), loss_passes(compiles)
    losses_K: Tensor = _TokenLosses.apply(logits_Kv, columns_K, group, passes)  # type: ignore[no-untyped-call]
    return losses_K.view_as(labels_BT)


class _TokenLosses(torch.autograd.Function):
    """log(sum of exp) minus the label's logit; each of the two needs one number per token from every rank."""

    @staticmethod
    def forward(ctx: Any, logits_Kv: Tensor, columns_K: Tensor, group: ProcessGroup, passes: LossPasses) -> Tensor:
        logits_Kv = logits_Kv.detach()
        highest_K = all_reduce(highest_logits(logits_Kv), "max", group)
        here = passes.sum_rows(logits_Kv, columns_K, highest_K)
        exps_K, labels_K = all_reduce(torch.stack([here.exps_K, here.labels_K]), "sum", group)
        sums = RowSums(highest_K, exps_K, labels_K)
        ctx.save_for_backward(logits_Kv, columns_K, *sums)
        ctx.gradients_in_place = passes.gradients_in_place
        return sums.losses()

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, None, None, None]:
        logits_Kv, columns_K, *sums = ctx.saved_tensors
        return ctx.gradients_in_place(logits_Kv, columns_K, RowSums(*sums), grad_K), None, None, None
