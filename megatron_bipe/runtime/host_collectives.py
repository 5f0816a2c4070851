"""Collectives of a few bytes between the hosts of all ranks, over a gloo group.

They do not involve the device: reading a value from it would wait for all the work that is queued there.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_bipe.parallel import Mesh
from megatron_bipe.runtime.exit_handling import rank_name

T = TypeVar("T")


class HostCollectives:
    """Host-side (gloo) collectives; all ranks create this object and call each method together.

    Args:
        mesh: this rank; the process group must be initialized.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._num_ranks = mesh.num_ranks
        self._group = dist.new_group(backend="gloo") if mesh.num_ranks > 1 else None
        self.names = self.all_gather_object(rank_name(mesh))  # with their hosts

    def any_rank(self, here: bool) -> bool:
        """Return True if `here` is true on any rank."""
        return bool(self._all_reduce(int(here), dist.ReduceOp.MAX))

    def all_reduce_sum(self, number: int) -> int:
        return self._all_reduce(number, dist.ReduceOp.SUM)

    def broadcast_object(self, thing: T) -> T:
        """Return the main rank's object; those of other ranks are ignored."""
        things: list[Any] = [thing]
        if self._group is not None:
            dist.broadcast_object_list(things, src=0, group=self._group)
        received: T = things[0]
        return received

    def all_gather_object(self, thing: T) -> list[T]:
        """Return the objects of all ranks, by rank."""
        things: list[Any] = [thing] * self._num_ranks
        if self._group is not None:
            dist.all_gather_object(things, thing, group=self._group)
        return things

    def _all_reduce(self, number: int, operation: dist.ReduceOp.RedOpType) -> int:
        numbers = torch.tensor(number)
        if self._group is not None:
            dist.all_reduce(numbers, operation, group=self._group)
        return int(numbers)
