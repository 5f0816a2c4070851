"""Joining a launch: reads the variables of its launcher, and sets those of torch and DeepSpeed."""

import errno
import os
import socket
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_bipe.config import RunConfig
from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.environment import DEVICE, prepare_cuda, prepare_environment
from megatron_bipe.runtime.launcher_env import Launch, Rendezvous, read_launch

LOOPBACK, _LOOPBACK_INTERFACE = "127.0.0.1", "lo"

_AGENT_HOSTS_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun sets it to True, and torch reads it
_START_S = 600.0  # limit for rank 0 to start

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


def join_launch(launch: Launch | None = None, run: RunConfig | None = None) -> "Mesh":
    """Select device and threads of this rank, and set the environment variables of torch and DeepSpeed.

    The cores of the machine are divided evenly among its ranks, unless SLURM or OMP_NUM_THREADS sets their number.
    Ranks that are all on one host communicate over its loopback interface, which other hosts cannot reach.

    Args:
        launch: result of `find_launch`; None: call it.
        run: the run, whose layout and `train.deterministic` determine settings of CUDA; None: one with the defaults.

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
    if _is_on_one_host(launch):
        _use_loopback(launch)
    if device_type() == "cuda":
        device = torch.device("cuda", _own_gpu(launch, torch.cuda.device_count()))
        _set_cuda_options(run or RunConfig())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "OMP_NUM_THREADS" not in env:
        cores = len(os.sched_getaffinity(0))
        own_cores = launch.own_cores or cores // launch.num_local_ranks
        torch.set_num_threads(max(1, min(cores, own_cores)))  # SLURM may have bound this rank to its own cores
    return Mesh(launch.rank, launch.local_rank, launch.num_ranks, launch.num_local_ranks, device)


def _set_cuda_options(run: RunConfig) -> None:
    """Set the options of CUDA and cuBLAS for a run.

    cuBLAS may split a matrix product of bf16 along the dimension that it sums over, and add the parts in bf16. In
    gradients of small weights, which have few output tiles and sum over all tokens, that is likely: it is switched off.
    """
    import torch

    prepare_cuda(run)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if run.train.deterministic:
        torch.use_deterministic_algorithms(True)
        # Otherwise each empty tensor is filled first, only so that reads of uninitialized memory would be repeatable.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def host_store(mesh: "Mesh") -> "dist.Store | None":
    """Start the store of a launch on one host, on its main rank, before torch does.

    torch's own store accepts connections to all interfaces from anyone, and what clients write there is obeyed.

    Returns:
        The store; keep it until torch has created the group of all ranks, which shares its server.

    Raises:
        ConfigError: another process uses the port.
    """
    import torch.distributed as dist

    if not (mesh.is_main and _is_on_one_host(mesh)):
        return None
    port = int(os.environ["MASTER_PORT"])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an earlier launch may have used it recently
        try:
            listener.bind((LOOPBACK, port))
            listener.listen(mesh.num_ranks)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise port_error(str(error)) from error
        socket_fd = listener.detach()
    return dist.TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=socket_fd
    )


def launch_store(mesh: "Mesh", timeout_s: float) -> list["dist.Store"]:
    """Start the store of a launch, or connect to it, without waiting for other ranks to do so.

    Returns:
        Connections that may be used at the same time, and rank 0's server, which lives as long as the list.

    Raises:
        ConfigError: another process uses the port, or the store cannot be reached (transient).
    """
    import torch.distributed as dist

    env = os.environ
    servers = [host_store(mesh)]
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    try:
        if mesh.is_main and servers == [None] and env.get(_AGENT_HOSTS_STORE) != str(True):
            servers = [dist.TCPStore(address, port, is_master=True, wait_for_workers=False, multi_tenant=True)]
        connections = [connect_store(timeout_s, "preflight") for _ in range(2)]
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise port_error(str(error)) from error
        raise ConfigError(
            f"the store of the launch cannot be reached within {timeout_s:g} s: {str(error).splitlines()[0]}",
            remedy=f"Start rank 0, whose host must be {address}, and let other hosts connect to its port {port}",
            location=f"rank {mesh.rank} on {socket.gethostname()}",
            transient=True,
        ) from error
    return [*connections, *(server for server in servers if server is not None)]


def find_gloo_interface(ranks: "Launch | Mesh") -> str:
    """Return the interface or address on which gloo listens on this host.

    Raises:
        ConfigError: other hosts of the launch cannot reach it. gloo itself would wait for them without a message.
    """
    name = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if name:
        present = [interface for _, interface in socket.if_nameindex()]
        if name.split(",")[0] not in present:
            raise _gloo_error(f"GLOO_SOCKET_IFNAME={name}, but the interfaces of this host are {', '.join(present)}")
        return name
    address = _own_address()
    if _is_loopback(address) and not (_is_on_one_host(ranks) or _is_loopback(os.environ["MASTER_ADDR"])):
        raise _gloo_error(f"gloo listens on the address of the host name, which is {address}")
    return address


def _own_address() -> str:
    """Return the address that gloo listens on: the first one of the host name that this host has, else the loopback."""
    with suppress(OSError):
        for family, kind, *_, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)
                return str(address[0])
    return LOOPBACK


def host_group_error(ranks: "Launch | Mesh", error: Exception) -> Exception:
    """Return the error for a host-side (gloo) group that did not start; on one host, `error` itself."""
    if _is_on_one_host(ranks):
        return error
    return _gloo_error(f"the host-side (gloo) group of all ranks did not start: {error}", transient=True)


def _gloo_error(seen: str, *, transient: bool = False) -> ConfigError:
    return ConfigError(
        f"{seen}; the hosts of a launch must reach each other's gloo address",
        remedy="Set GLOO_SOCKET_IFNAME on every host to the interface that connects them, which ip addr shows; "
        "deepspeed passes it to other hosts only from a file .deepspeed_env, with a line GLOO_SOCKET_IFNAME=NAME",
        location="GLOO_SOCKET_IFNAME",
        transient=transient,
    )


def _is_loopback(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")


def port_error(seen: str) -> ConfigError:
    """Return the error for a rendezvous port that another process uses."""
    return ConfigError(
        f"the rendezvous port is in use, perhaps by another launch on this host: {seen}",
        remedy="Choose another port: deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT",
        location=f"MASTER_PORT={os.environ.get('MASTER_PORT')} on {socket.gethostname()}",
        transient=True,  # the other launch may end, as when a supervisor restarts this one
    )


def connect_store(timeout_s: float, name: str = "") -> "dist.Store":
    """Return a new connection to the store of the joined launch, which rank 0 or torchrun hosts.

    Args:
        timeout_s: longest wait for the store.
        name: separates the keys of different runs, should two launches have the same port.

    Raises:
        torch.distributed.DistError: no connection within `timeout_s`.
    """
    import torch.distributed as dist

    env = os.environ
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=timeout)
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store when it restarts all ranks
    return dist.PrefixStore(f"attempt-{attempt} {name}", store)


def _is_on_one_host(ranks: "Launch | Mesh") -> bool:
    return ranks.num_local_ranks == ranks.num_ranks


def _use_loopback(launch: Launch) -> None:
    """Let the ranks of a launch on one host listen on its loopback interface only.

    torchrun's store, which listens on all interfaces, then only carries the port of rank 0's.
    """
    env = os.environ
    if env.get(_AGENT_HOSTS_STORE) == str(True):
        agents = connect_store(_START_S)
        if launch.is_main:
            agents.set("port", str(free_port()))
        env.update(MASTER_PORT=agents.get("port").decode(), **{_AGENT_HOSTS_STORE: str(False)})
    env["MASTER_ADDR"] = LOOPBACK
    if any(name == _LOOPBACK_INTERFACE for _, name in socket.if_nameindex()):
        env.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK_INTERFACE)
        env.setdefault("NCCL_SOCKET_IFNAME", f"={_LOOPBACK_INTERFACE}")  # without "=", the start of a name


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
