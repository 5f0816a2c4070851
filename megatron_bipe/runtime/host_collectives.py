"""What the hosts of all ranks settle among themselves, without a device taking part.

A device works through what its host has queued for it; to ask it something is to wait for it. So what concerns hosts
alone goes from host to host, a few bytes at a time, over a group of its own.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.exit_handling import rank_name

T = TypeVar("T")


class HostCollectives:
    """All ranks call each method together; every rank of the launch makes one, once the process group stands.

    Args:
        mesh: this process.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._num_ranks = mesh.num_ranks
        self._group = dist.new_group(backend="gloo") if mesh.num_ranks > 1 else None
        self.names = self.all_gather_object(rank_name(mesh))  # with their hosts

    def any_rank(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self._reduced(int(here), dist.ReduceOp.MAX))

    def all_reduce_sum(self, number: int) -> int:
        """The sum over ranks."""
        return self._reduced(number, dist.ReduceOp.SUM)

    def broadcast_object(self, thing: T) -> T:
        """What the main rank has; those of others are not looked at."""
        things: list[Any] = [thing]
        if self._group is not None:
            dist.broadcast_object_list(things, src=0, group=self._group)
        told: T = things[0]
        return told

    def all_gather_object(self, thing: T) -> list[T]:
        """What each rank has, by rank."""
        things: list[Any] = [thing] * self._num_ranks
        if self._group is not None:
            dist.all_gather_object(things, thing, group=self._group)
        return things

    def _reduced(self, number: int, operation: dist.ReduceOp.RedOpType) -> int:
        numbers = torch.tensor(number)
        if self._group is not None:
            dist.all_reduce(numbers, operation, group=self._group)
        return int(numbers)
