"""The layer factory: the only place that knows which classes hold the matrices of the model.

The model asks for a layer by its role in tensor parallelism (column, row, table, output); one process
gets plain torch layers from here, `parallel.tensor` may hand in a factory whose layers hold a share.
"""

from typing import Protocol

from torch import nn


class LayerFactory(Protocol):
    """Makes the matrices of the model; widths are those of the whole model, not of this rank."""

    ranks: int
    """Tensor-parallel ranks that share the heads, the inner feed-forward width and the vocabulary."""

    def column(self, width_in: int, width_out: int, blocks: int = 1) -> nn.Module:
        """Bias-free matrix whose output is split over ranks, each of its `blocks` equal parts by itself."""

    def row(self, width_in: int, width_out: int) -> nn.Module:
        """Bias-free matrix whose input is split over ranks; the output is whole on every rank."""

    def table(self, rows: int, width: int, padding_row: int | None) -> nn.Module:
        """Token embedding, split by rows; the gradient of `padding_row` is zero."""

    def output(self, width_in: int, rows: int) -> nn.Module:
        """Bias-free projection to the vocabulary, split by rows."""


class LocalLayers:
    """Plain torch layers: the whole model on one rank."""

    ranks = 1

    def column(self, width_in: int, width_out: int, blocks: int = 1) -> nn.Module:
        """A whole matrix; `blocks` matters only where it is split."""
        del blocks
        return nn.Linear(width_in, width_out, bias=False)

    def row(self, width_in: int, width_out: int) -> nn.Module:
        """A whole matrix."""
        return nn.Linear(width_in, width_out, bias=False)

    def table(self, rows: int, width: int, padding_row: int | None) -> nn.Module:
        """A whole embedding table."""
        return nn.Embedding(rows, width, padding_idx=padding_row)

    def output(self, width_in: int, rows: int) -> nn.Module:
        """A whole output projection."""
        return nn.Linear(width_in, rows, bias=False)
