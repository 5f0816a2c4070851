"""Who this process is among the ranks of a launch, and in which groups."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_bipe.config.schema import ParallelConfig


class Mesh(NamedTuple):
    """This process among all of a launch.

    Ranks are laid out in four axes, the tensor-parallel ones next to each other, since they speak most:
    rank = ((stage x data-parallel ranks + data rank) x context-parallel ranks + context rank) x tensor-parallel ranks
    + tensor rank.
    """

    rank: int
    local_rank: int
    num_ranks: int
    num_local_ranks: int
    device: torch.device
    tensor: int = 1  # ranks that share each layer
    context: int = 1  # ranks that share each window
    pipeline: int = 1  # stages
    sequence: bool = False  # whether tensor-parallel ranks share windows, too

    def with_layout(self, parallel: ParallelConfig) -> "Mesh":
        """The same process in a layout."""
        return self._replace(
            tensor=parallel.tensor,
            context=parallel.context,
            pipeline=parallel.pipeline,
            sequence=parallel.sequence,
        )

    @property
    def data_ranks(self) -> int:
        """Copies of the model."""
        return self.replica_ranks // self.context

    @property
    def tensor_rank(self) -> int:
        """Place among those that share a layer."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Which copy of the model this rank is part of."""
        return self.replica_rank // self.context

    @property
    def context_rank(self) -> int:
        """Place among those that share a window."""
        return self.replica_rank % self.context

    @property
    def replica_ranks(self) -> int:
        """Ranks that have the same part of the model, this one included: data- and context-parallel ones."""
        return self.num_ranks // (self.tensor * self.pipeline)

    @property
    def replica_rank(self) -> int:
        """Place among them."""
        return self.rank // self.tensor % self.replica_ranks

    @property
    def stage(self) -> int:
        """Which part of the layers it has."""
        return self.rank // (self.tensor * self.replica_ranks)

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs, metrics and pointers."""
        return self.rank == 0


def tensor_group(mesh: Mesh) -> dist.ProcessGroup:
    """The ranks that share this rank's layers; every rank of the launch calls this, to form all such groups."""
    starts = range(0, mesh.num_ranks, mesh.tensor)
    own = _own_group(mesh, [range(start, start + mesh.tensor) for start in starts])
    assert own is not None
    return own


def context_group(mesh: Mesh) -> dist.ProcessGroup:
    """The ranks that share this rank's windows; every rank of the launch calls this, to form all such groups."""
    together = mesh.tensor * mesh.context
    firsts = [start + place for start in range(0, mesh.num_ranks, together) for place in range(mesh.tensor)]
    own = _own_group(mesh, [range(first, first + together, mesh.tensor) for first in firsts])
    assert own is not None
    return own


def end_stages_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """This rank and its like on the other end of the pipeline, None between them; every rank calls this."""
    ranks_a_stage = mesh.num_ranks // mesh.pipeline
    return _own_group(mesh, [(rank, mesh.num_ranks - ranks_a_stage + rank) for rank in range(ranks_a_stage)])


def _own_group(mesh: Mesh, all_ranks: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """Forms groups of ranks; the one that this rank is in."""
    own: dist.ProcessGroup | None = None
    for ranks in all_ranks:
        group = dist.new_group(list(ranks))
        own = group if mesh.rank in ranks else own
    return own
