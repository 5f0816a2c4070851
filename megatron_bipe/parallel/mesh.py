"""Who this process is among the ranks: the only place that reads the launcher's environment."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_bipe.config.schema import ParallelConfig


class Mesh(NamedTuple):
    """This process among all of a launch.

    Ranks are laid out in three axes, the tensor-parallel ones next to each other, since they speak most:
    rank = (stage x data-parallel ranks + data rank) x tensor-parallel ranks + tensor rank.
    """

    rank: int
    local_rank: int
    num_ranks: int
    num_local_ranks: int
    device: torch.device
    tensor: int = 1  # ranks that share each layer
    pipeline: int = 1  # stages
    sequence: bool = False  # whether tensor-parallel ranks share windows, too

    def laid_out(self, parallel: ParallelConfig) -> "Mesh":
        """The same process in a layout."""
        return self._replace(tensor=parallel.tensor, pipeline=parallel.pipeline, sequence=parallel.sequence)

    @property
    def data_ranks(self) -> int:
        """Copies of the model."""
        return self.num_ranks // (self.tensor * self.pipeline)

    @property
    def tensor_rank(self) -> int:
        """Place among those that share a layer."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Which copy of the model this rank is part of."""
        return self.rank // self.tensor % self.data_ranks

    @property
    def replica_ranks(self) -> int:
        """Ranks that have the same part of the model, this one included."""
        return self.num_ranks // (self.tensor * self.pipeline)

    @property
    def replica_rank(self) -> int:
        """Place among them."""
        return self.rank // self.tensor % self.replica_ranks

    @property
    def stage(self) -> int:
        """Which part of the layers it has."""
        return self.rank // (self.tensor * self.data_ranks)

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


def join_launch() -> Mesh:
    """Read the launch (deepspeed, torchrun and the like set it) and settle device and threads.

    Without a launcher this is a launch of one rank. On CPU the cores of the machine are shared evenly among
    its ranks, unless OMP_NUM_THREADS says otherwise.
    """
    env = os.environ
    if "RANK" not in env:
        env.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", "0")  # a free one
    local_rank, num_ranks = int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"])
    num_local = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or num_ranks)
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in env:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_local))
    return Mesh(int(env["RANK"]), local_rank, num_ranks, num_local, device)
