"""Joining a launch: reads the variables of its launcher, and sets those that torch and DeepSpeed know."""

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.environment import DEVICE, prepare_environment
from megatron_bipe.runtime.launcher_env import Launch, Rendezvous, read_launch

if TYPE_CHECKING:  # torch is imported when the launch is joined; the configuration is checked before
    import torch.distributed as dist

    from megatron_bipe.parallel.mesh import Mesh


def find_launch() -> Launch:
    """Read the launch that this process belongs to; without a launcher it is one of one rank.

    Sets what torch and DeepSpeed read when they are imported (`prepare_environment`).

    Raises:
        ConfigError: the launcher's variables do not fit together.
    """
    prepare_environment()
    return read_launch(os.environ, _agree_by_mpi, free_port)


def join_launch(launch: Launch | None = None) -> "Mesh":
    """Settle device and threads of a rank, and tell torch and DeepSpeed in the variables that they know.

    On CPU the cores of the machine are shared evenly among its ranks, unless OMP_NUM_THREADS says otherwise.

    Args:
        launch: what `find_launch` returned; None: call it.

    Raises:
        ConfigError: there is no GPU for this rank; or as `find_launch`.
    """
    import torch

    from megatron_bipe.parallel.mesh import Mesh
    from megatron_bipe.runtime.hardware import device_type

    env = os.environ
    launch = launch or find_launch()
    env.update(
        RANK=str(launch.rank),
        LOCAL_RANK=str(launch.local_rank),
        WORLD_SIZE=str(launch.num_ranks),
        LOCAL_WORLD_SIZE=str(launch.num_local_ranks),
        MASTER_ADDR=launch.meeting.address,
        MASTER_PORT=str(launch.meeting.port),
    )
    if device_type() == "cuda":
        device = torch.device("cuda", _own_gpu(launch, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in env:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.num_local_ranks))
    return Mesh(launch.rank, launch.local_rank, launch.num_ranks, launch.num_local_ranks, device)


def connect_store(timeout_s: float) -> "dist.Store":
    """A connection of its own to the store that rank 0, or torchrun for it, opens for the launch joined.

    Raises:
        torch.distributed.DistError: it was not opened within the time.
    """
    import torch.distributed as dist

    env = os.environ
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=timeout)
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store when it starts all ranks again
    return dist.PrefixStore(f"attempt-{attempt}", store)


def _own_gpu(launch: Launch, num_gpus: int) -> int:
    if launch.local_rank >= num_gpus:
        raise ConfigError(
            f"a rank takes the GPU of its number on the host, and local rank {launch.local_rank} sees {num_gpus}",
            remedy="Start at most as many ranks a host as it has GPUs, and let each rank see all of them (SLURM: "
            f"--gpus-per-node, without --gpus-per-task or --gpu-bind). CPU ranks take {DEVICE}=cpu DS_ACCELERATOR=cpu",
            location=f"rank {launch.rank} on {socket.gethostname()}",
        )
    return launch.local_rank


def _agree_by_mpi(one_host: bool) -> Rendezvous:
    """Rank 0's host and a free port there, told to all; MPI is not used any further."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            f"this process was started by MPI, but mpi4py, by which ranks tell each other where to meet, cannot be "
            f"loaded: {error}",
            remedy="pip install 'megatron-bipe[mpi]', or give all ranks MASTER_ADDR and MASTER_PORT",
            location="mpiexec",
        ) from error
    agreed: Rendezvous = MPI.COMM_WORLD.bcast(
        Rendezvous("127.0.0.1" if one_host else socket.gethostname(), free_port())
    )
    MPI.Finalize()
    return agreed


def free_port() -> int:
    """Return a port of this host that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
