"""Interfaces between the model and parallelism: which classes hold the parameters, and how sequences are exchanged.

The model asks a `LayerFactory` for each layer by its role in tensor parallelism. `model.transformer.LocalLayers` makes
plain torch layers; `parallel.tensor_parallel` makes layers that hold a shard and communicate with the other ranks.

B batch · T positions · G head groups · V vocabulary · X more (lower case: this rank's share)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class HeadExchange(Protocol):
    """How windows are spread over ranks: each has a run of positions, and inside attention whole windows of some heads.

    The functions take windows [B, T, ...] and return them in the other form; gradients go the way back.
    """

    rank: int
    """This rank among those that share a window."""
    ranks: int
    """How many do."""

    def own(self, ids_BT: Tensor) -> Tensor:
        """This rank's positions of ids that all ranks have."""

    def to_heads(self, x_BtGX: Tensor) -> Tensor:
        """From own positions of all head groups to all positions of own ones: [B, t, G, ...] -> [B, T, g, ...]."""

    def to_tokens(self, x_BTgX: Tensor) -> Tensor:
        """The way back."""


class NoExchange:
    """Each rank has whole windows."""

    rank, ranks = 0, 1

    def own(self, ids_BT: Tensor) -> Tensor:
        """All of them."""
        return ids_BT

    def to_heads(self, x_BTGX: Tensor) -> Tensor:
        """As it is."""
        return x_BTGX

    def to_tokens(self, x_BTGX: Tensor) -> Tensor:
        """As it is."""
        return x_BTGX


class LayerFactory(Protocol):
    """Makes the layers with parameters; widths are those of the whole model, not of this rank."""

    rank: int
    """This rank among those that share the heads, the inner feed-forward width and the vocabulary."""
    ranks: int
    """How many do; each has a contiguous share."""
    exchange: HeadExchange
    """How windows are spread; layers see this rank's positions."""

    def column(self, width_in: int, width_out: int, blocks: int = 1) -> nn.Module:
        """Bias-free matrix whose output is split over ranks, each of its `blocks` equal parts by itself."""

    def row(self, width_in: int, width_out: int) -> nn.Module:
        """Bias-free matrix whose input is split over ranks; the sum of all outputs goes to the residual stream."""

    def table(self, rows: int, width: int, padding_row: int | None) -> nn.Module:
        """Token embedding, split by rows, into the residual stream; the gradient of `padding_row` is zero."""

    def replicated_embedding(self, rows: int, width: int, padding_row: int | None) -> nn.Module:
        """Embedding that is whole on every rank, into the residual stream."""

    def local_sequence_ids(self, ids_Bt: Tensor) -> Tensor:
        """Of the ids of this rank's positions, those of its part of the residual stream."""

    def per_head_embedding(self, rows: int, num_heads: int) -> nn.Module:
        """Embedding with a column a query head, split over ranks by columns; its output stays with its rank."""

    def norm(self, width: int, eps: float) -> nn.Module:
        """Norm of the residual stream, whole on every rank."""

    def output(self, width_in: int, rows: int) -> nn.Module:
        """Bias-free projection to the vocabulary, split by rows; logits stay with their rank."""

    def token_losses(self, logits_Btv: Tensor, labels_BT: Tensor) -> Tensor:
        """Cross-entropy in nats of this rank's tokens, fp32 [B, t], from what `output` gives and all labels [B, T]."""


def local_heads(num_heads: int, layers: LayerFactory) -> slice:
    """Which of the model's query heads this rank's attention sees."""
    count = num_heads // (layers.ranks * layers.exchange.ranks)
    first = (layers.rank * layers.exchange.ranks + layers.exchange.rank) * count
    return slice(first, first + count)


@dataclass(frozen=True)
class Shard:
    """Which part of a whole parameter this rank holds: of each block along `dim`, the `rank`-th of `ranks` parts."""

    dim: int
    blocks: int
    rank: int
    ranks: int

    def full_shape(self, part: Sequence[int]) -> list[int]:
        """Shape of the parameter that a part of this shape belongs to."""
        return [size * self.ranks if dim == self.dim else size for dim, size in enumerate(part)]

    def of(self, full: Tensor) -> Tensor:
        """This rank's part of a whole parameter."""
        split = full.unflatten(self.dim, (self.blocks, self.ranks, -1))
        return split.select(self.dim + 1, self.rank).flatten(self.dim, self.dim + 1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole parameter from the parts of all ranks, in order."""
        split = [part.unflatten(self.dim, (self.blocks, 1, -1)) for part in parts]
        return torch.cat(split, dim=self.dim + 1).flatten(self.dim, self.dim + 2)


def shard_of(parameter: Tensor) -> Shard | None:
    """How a parameter is split; None where it is whole on every rank."""
    shard: Shard | None = getattr(parameter, "shard", None)
    return shard
