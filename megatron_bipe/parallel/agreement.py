"""What the hosts of all ranks settle among themselves, without a device taking part.

A device works through what its host has queued for it; to ask it something is to wait for it. So what concerns hosts
alone goes from host to host, a few bytes at a time, over a group of its own.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_bipe.parallel.failure import rank_name
from megatron_bipe.parallel.mesh import Mesh


class Agreement:
    """All ranks call each method together; every rank of the launch makes one, once the process group stands.

    Args:
        mesh: this process.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._group = dist.new_group(backend="gloo") if mesh.num_ranks > 1 else None
        self.names = [rank_name(mesh)]  # of all ranks, with their hosts
        if self._group is not None:
            found: list[str] = [""] * mesh.num_ranks
            dist.all_gather_object(found, self.names[0], group=self._group)
            self.names = found

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        if self._group is None:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def as_main(self, values: Sequence[float]) -> list[float]:
        """The values of the main rank; equally many on each."""
        sent = torch.tensor(values, dtype=torch.float64)
        if self._group is not None and len(values):
            dist.broadcast(sent, src=0, group=self._group)
        return [float(value) for value in sent.tolist()]

    def of_all(self, value: float) -> list[float]:
        """The value of every rank."""
        if self._group is None:
            return [value]
        found = [torch.empty(1, dtype=torch.float64) for _ in self.names]
        dist.all_gather(found, torch.tensor([value], dtype=torch.float64), group=self._group)
        return [float(one) for one in found]
