"""Who this process is among the ranks: the only place that reads the launcher's environment."""

import os
from typing import NamedTuple

import torch


class Mesh(NamedTuple):
    """This process among all of a launch; every rank is a data-parallel one."""

    rank: int
    local_rank: int
    num_ranks: int
    num_local_ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs, metrics and pointers."""
        return self.rank == 0


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
