"""Interfaces between the model and parallelism: the classes that hold parameters, and the exchange of sequence shards.

The model requests each layer from a `LayerFactory` by its role in tensor parallelism. `model.transformer.LocalLayers`
makes plain torch layers; `parallel.tensor_parallel` makes layers that hold a shard and communicate with other ranks.

B batch · T positions · G head groups · V vocabulary · X remaining dimensions (lower case: this rank's shard)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class HeadExchange(Protocol):
    """Context-parallel sharding: ranks hold a slice of positions, and inside attention full sequences of some heads.

    The exchange methods map [B, T, ...] tensors from one form to the other; gradients take the reverse path.
    """

    rank: int
    """This rank's index in the context-parallel group."""
    ranks: int
    """Size of that group."""

    def local_positions(self, ids_BT: Tensor) -> Tensor:
        """Return this rank's positions of ids that are replicated on all ranks."""

    def to_heads(self, x_BtGX: Tensor) -> Tensor:
        """Exchange some positions of all heads for all positions of some heads: [B, t, G, ...] -> [B, T, g, ...]."""

    def to_tokens(self, x_BTgX: Tensor) -> Tensor:
        """Invert `to_heads`."""


class NoExchange:
    """A `HeadExchange` for ranks that hold full sequences; it returns every tensor unchanged."""

    rank, ranks = 0, 1

    def local_positions(self, ids_BT: Tensor) -> Tensor:
        return ids_BT

    def to_heads(self, x_BTGX: Tensor) -> Tensor:
        return x_BTGX

    def to_tokens(self, x_BTGX: Tensor) -> Tensor:
        return x_BTGX


class LayerFactory(Protocol):
    """A factory of layers with parameters; all widths are those of the unsharded model."""

    rank: int
    """This rank's index in the tensor-parallel group, which shards heads, feed-forward width and vocabulary."""
    ranks: int
    """Size of that group; each rank holds a contiguous shard."""
    exchange: HeadExchange
    """Context-parallel sharding of sequences; layers see this rank's positions."""
    compiles: bool
    """True if blocks and the loss run as code that torch.compile has fused."""

    def column(self, width_in: int, width_out: int, blocks: int = 1) -> nn.Module:
        """Make a bias-free linear layer with sharded output; each of its `blocks` equal parts is sharded separately."""

    def gather_columns(self, x_BTf: Tensor) -> Tensor:
        """Return the output of a `column` layer on all ranks."""

    def row(self, width_in: int, width_out: int) -> nn.Module:
        """Make a bias-free linear layer with sharded input; the outputs are summed into the residual stream."""

    def vocab_embedding(self, rows: int, width: int, padding_row: int | None) -> nn.Module:
        """Make a token embedding sharded by rows; the gradient of `padding_row` is zero."""

    def replicated_embedding(self, rows: int, width: int, padding_row: int | None) -> nn.Module:
        """Make an embedding that is replicated on every rank, for the residual stream."""

    def local_sequence_ids(self, ids_Bt: Tensor) -> Tensor:
        """Return the ids, among those of this rank's positions, that belong to its shard of the residual stream."""

    def per_head_embedding(self, rows: int, num_heads: int) -> nn.Module:
        """Make an embedding with one column per query head, sharded by columns; its output stays sharded."""

    def norm(self, width: int, eps: float) -> nn.Module:
        """Make a norm of the residual stream, replicated on every rank."""

    def output(self, width_in: int, rows: int) -> nn.Module:
        """Make the bias-free projection to the vocabulary, sharded by rows; logits stay sharded."""

    def token_losses(self, logits_Btv: Tensor, labels_BT: Tensor) -> Tensor:
        """Return this rank's cross-entropy in nats, fp32 [B, t], from logits of `output` and all labels [B, T]."""


def local_heads(num_heads: int, layers: LayerFactory) -> slice:
    """Return the slice of the model's query heads that this rank's attention computes."""
    count = num_heads // (layers.ranks * layers.exchange.ranks)
    first = (layers.rank * layers.exchange.ranks + layers.exchange.rank) * count
    return slice(first, first + count)


@dataclass(frozen=True)
class Shard:
    """A rank's shard of a parameter: within each of `blocks` blocks along `dim`, part `rank` of `ranks`."""

    dim: int
    blocks: int
    rank: int
    ranks: int

    def full_shape(self, part: Sequence[int]) -> list[int]:
        """Return the shape of the full parameter whose shard has the shape `part`."""
        return [size * self.ranks if dim == self.dim else size for dim, size in enumerate(part)]

    def select(self, full: Tensor) -> Tensor:
        """Return this rank's shard of a full parameter."""
        split = full.unflatten(self.dim, (self.blocks, self.ranks, -1))
        return split.select(self.dim + 1, self.rank).flatten(self.dim, self.dim + 1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Concatenate the shards of all ranks, in order, into the full parameter."""
        split = [part.unflatten(self.dim, (self.blocks, 1, -1)) for part in parts]
        return torch.cat(split, dim=self.dim + 1).flatten(self.dim, self.dim + 2)


def shard_of(parameter: Tensor) -> Shard | None:
    """Return how a parameter is sharded, or None if it is replicated on every rank."""
    shard: Shard | None = getattr(parameter, "shard", None)
    return shard
