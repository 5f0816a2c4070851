"""Parsing of the environment variables that launchers set.

The functions receive the variables as an argument; `distributed_init.py` reads the environment.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from megatron_bipe.errors import ConfigError

_log = logging.getLogger(__name__)


class Rendezvous(NamedTuple):
    """Rendezvous of the ranks of a launch: a port on rank 0's host."""

    address: str
    port: int


class Launch(NamedTuple):
    """Coordinates of a process in its launch."""

    rank: int
    local_rank: int  # on its host
    num_ranks: int
    num_local_ranks: int
    rendezvous: Rendezvous
    own_cores: int | None = None  # that SLURM gives each task; None: the ranks of a host share its cores

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class Launcher(NamedTuple):
    """The variables that a launcher sets; of alternatives, the first one that is set applies.

    A launcher is recognized by the local rank: if launchers are nested, such as mpiexec in a SLURM job, or a batch
    system numbers hosts by RANK, only the launcher that started the process itself has set it.
    """

    name: str
    rank: tuple[str, ...]
    num_ranks: tuple[str, ...]
    local_rank: tuple[str, ...]
    num_local_ranks: tuple[str, ...]


_TORCH = Launcher(
    "torchrun or deepspeed", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
)
_OPEN_MPI = Launcher(
    "Open MPI",
    ("OMPI_COMM_WORLD_RANK",),
    ("OMPI_COMM_WORLD_SIZE",),
    ("OMPI_COMM_WORLD_LOCAL_RANK",),
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
_HYDRA = Launcher(
    "MPICH or Intel MPI",
    ("PMI_RANK",),
    ("PMI_SIZE",),
    ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
    ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
)
_SLURM = Launcher(
    "srun",
    ("SLURM_PROCID",),
    ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    ("SLURM_LOCALID",),
    ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
)
LAUNCHERS = (_TORCH, _OPEN_MPI, _HYDRA, _SLURM)

_JOB, _STEP, _HOST = ("SLURM_JOB_ID",), ("SLURM_STEP_ID",), ("SLURM_NODEID",)
_HOST_LIST = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
_CORES = ("SLURM_CPUS_PER_TASK",)
_ADDRESS, _PORT = ("MASTER_ADDR",), ("MASTER_PORT",)
_SPECIAL_STEPS = 0xFFFFFFF0  # first step id of processes not started by srun: batch scripts, salloc shells
_FIRST_PORT, _NUM_PORTS, _PORTS_PER_JOB = 15000, 10000, 16  # below the ephemeral ports of Linux


def read_launch(env: Mapping[str, str], agree: Callable[[bool], Rendezvous], free_port: Callable[[], int]) -> Launch:
    """Return the launch that an environment describes; without a launcher, it has one rank.

    Args:
        env: the environment.
        agree: returns the rendezvous of MPI ranks, given whether they are all on one host; collective.
        free_port: returns an unused port of this host.

    Raises:
        ConfigError: the launcher's variables are incomplete or contradict each other.
    """
    variables = _find_launcher(env)
    if variables is None:
        return Launch(0, 0, 1, 1, Rendezvous("127.0.0.1", free_port()))
    launcher = variables.launcher
    rank, num_ranks, local_rank = map(variables.number, (launcher.rank, launcher.num_ranks, launcher.local_rank))
    counts = variables.counts(launcher.num_local_ranks)
    host = variables.number(_HOST) if len(counts) > 1 else 0
    num_local_ranks = counts[min(host, len(counts) - 1)]
    if not (rank < num_ranks and local_rank < num_local_ranks <= num_ranks):
        raise variables.error(
            f"ranks start at 0, and a host has at most as many as the launch; this process would be rank {rank} of "
            f"{num_ranks}, local rank {local_rank} of {num_local_ranks}"
        )
    rendezvous = _rendezvous(variables, num_local_ranks == num_ranks, agree)
    own_cores = variables.number(_CORES) if launcher is _SLURM and variables.text(_CORES) else None
    return Launch(rank, local_rank, num_ranks, num_local_ranks, rendezvous, own_cores)


def first_host(hosts: str) -> str:
    """Return the first host of a SLURM host list: `rack[1-2]n[07,09-12],login` begins with `rack1n07`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert first is not None  # it also matches an empty string
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def tasks_by_host(counts: str) -> list[int] | None:
    """Expand SLURM's task counts by host: `4(x2),3` is [4, 4, 3]; None if the text is not such a list."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(",")]
    if None in found:
        return None
    return [int(match[1]) for match in found if match for _ in range(int(match[2] or 1))]


class _Variables(NamedTuple):
    """A launcher and the environment that it set."""

    launcher: Launcher
    env: Mapping[str, str]

    def text(self, names: tuple[str, ...]) -> str | None:
        """Return the first value of `names` that is set and not empty."""
        return next((self.env[name] for name in names if self.env.get(name)), None)

    def number(self, names: tuple[str, ...]) -> int:
        """Return the same as an integer.

        Raises:
            ConfigError: it is missing, or not a non-negative integer.
        """
        text = self.text(names)
        if text is None or not text.isdecimal():
            raise self.error(f"{' or '.join(names)} is {'missing' if text is None else 'not a non-negative integer'}")
        return int(text)

    def counts(self, names: tuple[str, ...]) -> list[int]:
        """Return the number of ranks on this host, or on each host if the launcher lists them.

        Raises:
            ConfigError: they are missing, or not counts.
        """
        if self.launcher is not _SLURM or self.text(names) is None:
            return [self.number(names)]
        counts = tasks_by_host(self.text(names) or "")
        if counts is None:
            raise self.error(f"{' or '.join(names)} is not a list of counts such as 4(x2),3")
        return counts

    def error(self, rule: str) -> ConfigError:
        """Return an error with the violated rule and the variables that are set."""
        more = (*_ADDRESS, *_PORT, *((*_JOB, *_STEP, *_HOST, *_HOST_LIST) if self.launcher is _SLURM else ()))
        names = (*(name for names in self.launcher[1:] for name in names), *more)
        listed = ", ".join(f"{name}={self.env[name]}" for name in names if name in self.env)
        return ConfigError(
            f"the variables of {self.launcher.name} do not define the rank of this process: {rule}. "
            f"Those set are {listed}",
            remedy="Start all ranks with one launcher, as examples/launch/ does, or unset these for a single rank",
            location=self.launcher.name,
        )


def _find_launcher(env: Mapping[str, str]) -> _Variables | None:
    """Return the launcher that started the process, or None.

    Raises:
        ConfigError: variables of a launcher are set, but not the local rank.
    """
    candidates = [_Variables(launcher, env) for launcher in LAUNCHERS]
    found = next(filter(_started_this_process, candidates), None)
    if found is not None:
        return found
    for candidate in candidates:
        if candidate.launcher is not _SLURM and any(map(candidate.text, candidate.launcher[1:])):
            raise candidate.error(f"{' or '.join(candidate.launcher.local_rank)} is missing")
    if env.get("SLURM_NTASKS", "1") != "1":
        _log.warning(
            "SLURM job %s has %s tasks, but srun did not start this process: it runs as a single rank",
            *(env.get("SLURM_JOB_ID"), env["SLURM_NTASKS"]),
        )
    return None


def _started_this_process(variables: _Variables) -> bool:
    """Return True if this launcher started the process.

    SLURM also sets task variables, with the task count of the job, in batch scripts and allocation shells, where no
    task runs. Only processes that srun started have an ordinary step id.
    """
    step = variables.text(_STEP) or ""
    in_step = step.isdecimal() and int(step) < _SPECIAL_STEPS
    return variables.text(variables.launcher.local_rank) is not None and (variables.launcher is not _SLURM or in_step)


def _rendezvous(variables: _Variables, one_host: bool, agree: Callable[[bool], Rendezvous]) -> Rendezvous:
    """Return the rendezvous; MASTER_ADDR and MASTER_PORT take precedence over derived values."""
    address, port = variables.text(_ADDRESS), variables.text(_PORT)
    if not address or not port:
        found = _derive_rendezvous(variables, one_host, agree)
        address, port = address or found.address, port or str(found.port)
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise variables.error(f"MASTER_PORT is not a port from 1 to {2**16 - 1}")
    return Rendezvous(address, int(port))


def _derive_rendezvous(variables: _Variables, one_host: bool, agree: Callable[[bool], Rendezvous]) -> Rendezvous:
    if variables.launcher is _TORCH:
        raise variables.error("MASTER_ADDR and MASTER_PORT are not both set")
    if variables.launcher is not _SLURM:
        return agree(one_host)
    hosts = variables.text(_HOST_LIST)
    if not hosts:
        raise variables.error(f"none of {', '.join(_HOST_LIST)} lists the hosts, and MASTER_ADDR is not set")
    ports = variables.number(_JOB) * _PORTS_PER_JOB + variables.number(_STEP) % _PORTS_PER_JOB
    return Rendezvous(first_host(hosts), _FIRST_PORT + ports % _NUM_PORTS)
