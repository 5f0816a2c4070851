"""Joining a launch: reads the variables of its launcher, and sets those of torch and DeepSpeed."""

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.environment import DEVICE, prepare_environment
from megatron_bipe.runtime.launcher_env import Launch, Rendezvous, read_launch

if TYPE_CHECKING:  # join_launch imports torch, after the configuration has been checked
    import torch.distributed as dist

    from megatron_bipe.parallel import Mesh


def find_launch() -> Launch:
    """Return the launch that this process belongs to; without a launcher, it has one rank.

    Also set the variables that torch and DeepSpeed read when they are imported (`prepare_environment`).

    Raises:
        ConfigError: the launcher's variables are incomplete or contradict each other.
    """
    prepare_environment()
    return read_launch(os.environ, _agree_by_mpi, free_port)


def join_launch(launch: Launch | None = None) -> "Mesh":
    """Select device and threads of this rank, and set the environment variables of torch and DeepSpeed.

    On CPU, the cores of the machine are divided evenly among its ranks, unless OMP_NUM_THREADS is set.

    Args:
        launch: result of `find_launch`; None: call it.

    Raises:
        ConfigError: there is no GPU for this rank, or as in `find_launch`.
    """
    import torch

    from megatron_bipe.parallel import Mesh
    from megatron_bipe.runtime.hardware import device_type

    env = os.environ
    launch = launch or find_launch()
    env.update(
        RANK=str(launch.rank),
        LOCAL_RANK=str(launch.local_rank),
        WORLD_SIZE=str(launch.num_ranks),
        LOCAL_WORLD_SIZE=str(launch.num_local_ranks),
        MASTER_ADDR=launch.rendezvous.address,
        MASTER_PORT=str(launch.rendezvous.port),
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
    """Return a new connection to the store of the joined launch, which rank 0 or torchrun hosts.

    Raises:
        torch.distributed.DistError: no connection within `timeout_s`.
    """
    import torch.distributed as dist

    env = os.environ
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=timeout)
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store when it restarts all ranks
    return dist.PrefixStore(f"attempt-{attempt}", store)


def _own_gpu(launch: Launch, num_gpus: int) -> int:
    if launch.local_rank >= num_gpus:
        raise ConfigError(
            f"a rank uses the GPU with its local rank, and local rank {launch.local_rank} sees {num_gpus} GPUs",
            remedy="Start at most one rank per GPU of a host, and let each rank see all of them (SLURM: "
            "--gpus-per-node, without --gpus-per-task or --gpu-bind). "
            f"To run on CPU, set {DEVICE}=cpu DS_ACCELERATOR=cpu",
            location=f"rank {launch.rank} on {socket.gethostname()}",
        )
    return launch.local_rank


def _agree_by_mpi(one_host: bool) -> Rendezvous:
    """Broadcast rank 0's host and a free port on it; MPI is not used for anything else."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            f"MPI started this process, but mpi4py, which exchanges the rendezvous address, cannot be loaded: {error}",
            remedy="Run pip install -e '.[mpi]', or set MASTER_ADDR and MASTER_PORT on all ranks",
            location="mpiexec",
        ) from error
    rendezvous: Rendezvous = MPI.COMM_WORLD.bcast(
        Rendezvous("127.0.0.1" if one_host else socket.gethostname(), free_port())
    )
    MPI.Finalize()
    return rendezvous


def free_port() -> int:
    """Return a port of this host that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
