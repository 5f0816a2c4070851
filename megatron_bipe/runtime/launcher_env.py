"""What launchers tell their processes: the variables of each, and how they are read.

Nothing here touches the environment; `distributed_init.py` does.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from megatron_bipe.errors import ConfigError

_log = logging.getLogger(__name__)


class Rendezvous(NamedTuple):
    """Where the ranks of a launch find each other: a port of rank 0's host."""

    address: str
    port: int


class Launch(NamedTuple):
    """A process among all of a launch."""

    rank: int
    local_rank: int  # among those of its host
    num_ranks: int
    num_local_ranks: int
    meeting: Rendezvous

    @property
    def is_main(self) -> bool:
        """True on the rank that speaks for all."""
        return self.rank == 0


class Launcher(NamedTuple):
    """The variables that a launcher sets; of alternatives, the first one that is there counts.

    The local rank is what a launcher is known by. Where launchers are nested, such as mpiexec in a SLURM job, and
    where a batch system numbers hosts by RANK, only the one that started the process itself has told it that.
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
_ADDRESS, _PORT = ("MASTER_ADDR",), ("MASTER_PORT",)
_SPECIAL_STEPS = 0xFFFFFFF0  # SLURM numbers from here what no srun started: batch scripts, shells of salloc
_FIRST_PORT, _NUM_PORTS, _PORTS_A_JOB = 15000, 10000, 16  # below those that Linux gives to outgoing connections


def read_launch(env: Mapping[str, str], agree: Callable[[bool], Rendezvous], free_port: Callable[[], int]) -> Launch:
    """Which rank of which launch a process with this environment is; one of one without a launcher.

    Args:
        env: the environment.
        agree: where MPI ranks meet, agreed on by all of them; takes whether they are all on one host.
        free_port: finds a port of this host that nothing listens on.

    Raises:
        ConfigError: the launcher's variables are incomplete or contradict each other.
    """
    seen = _seen(env)
    if seen is None:
        return Launch(0, 0, 1, 1, Rendezvous("127.0.0.1", free_port()))
    launcher = seen.launcher
    rank, num_ranks, local_rank = map(seen.number, (launcher.rank, launcher.num_ranks, launcher.local_rank))
    counts = seen.counts(launcher.num_local_ranks)
    host = seen.number(_HOST) if len(counts) > 1 else 0
    num_local_ranks = counts[min(host, len(counts) - 1)]
    if not (rank < num_ranks and local_rank < num_local_ranks <= num_ranks):
        raise seen.error(
            f"ranks count from 0, and a host has at most as many as the launch; this would be rank {rank} of "
            f"{num_ranks}, on its host {local_rank} of {num_local_ranks}"
        )
    return Launch(rank, local_rank, num_ranks, num_local_ranks, _meeting(seen, num_local_ranks == num_ranks, agree))


def first_host(hosts: str) -> str:
    """The first of SLURM's list of hosts: `rack[1-2]n[07,09-12],login` begins with `rack1n07`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert first is not None  # it matches an empty text, too
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def tasks_by_host(counts: str) -> list[int] | None:
    """SLURM's counts by host, one by one: `4(x2),3` is [4, 4, 3]; None if it is no such list."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(",")]
    if None in found:
        return None
    return [int(match[1]) for match in found if match for _ in range(int(match[2] or 1))]


class _Seen(NamedTuple):
    """A launcher and the environment that it left."""

    launcher: Launcher
    env: Mapping[str, str]

    def text(self, names: tuple[str, ...]) -> str | None:
        """The value of the first of alternatives that is there and not empty."""
        return next((self.env[name] for name in names if self.env.get(name)), None)

    def number(self, names: tuple[str, ...]) -> int:
        """The same as a number.

        Raises:
            ConfigError: it is missing, or no number from 0.
        """
        text = self.text(names)
        if text is None or not text.isdecimal():
            raise self.error(f"{' or '.join(names)} is {'missing' if text is None else 'no number from 0'}")
        return int(text)

    def counts(self, names: tuple[str, ...]) -> list[int]:
        """Ranks of this host, or those of each host where the launcher tells.

        Raises:
            ConfigError: they are missing, or no counts.
        """
        if self.launcher is not _SLURM or self.text(names) is None:
            return [self.number(names)]
        counts = tasks_by_host(self.text(names) or "")
        if counts is None:
            raise self.error(f"{' or '.join(names)} is no list of counts such as 4(x2),3")
        return counts

    def error(self, rule: str) -> ConfigError:
        """What is wrong, and all that was seen."""
        more = (*_ADDRESS, *_PORT, *((*_JOB, *_STEP, *_HOST, *_HOST_LIST) if self.launcher is _SLURM else ()))
        names = (*(name for names in self.launcher[1:] for name in names), *more)
        listed = ", ".join(f"{name}={self.env[name]}" for name in names if name in self.env)
        return ConfigError(
            f"the variables of {self.launcher.name} do not tell this process its place in the launch: {rule}. "
            f"Those seen are {listed}",
            remedy="Start all ranks with one launcher, as examples/launch/ does, or unset these for a single rank",
            location=self.launcher.name,
        )


def _seen(env: Mapping[str, str]) -> _Seen | None:
    """The launcher that started the process; None: it was none.

    Raises:
        ConfigError: a launcher's variables are there without the local rank.
    """
    views = [_Seen(launcher, env) for launcher in LAUNCHERS]
    found = next(filter(_started, views), None)
    if found is not None:
        return found
    for view in views:
        if view.launcher is not _SLURM and any(map(view.text, view.launcher[1:])):
            raise view.error(f"{' or '.join(view.launcher.local_rank)} is missing")
    if env.get("SLURM_NTASKS", "1") != "1":
        _log.warning(
            "SLURM job %s has %s tasks, but srun did not start this process: it is a launch of one rank",
            *(env.get("SLURM_JOB_ID"), env["SLURM_NTASKS"]),
        )
    return None


def _started(seen: _Seen) -> bool:
    """Whether this launcher started the process.

    SLURM sets task variables in a batch script and in the shell of an allocation, too, with the number of tasks of
    the whole job, none of which runs. What srun starts has the number of an ordinary step as well.
    """
    step = seen.text(_STEP) or ""
    in_step = step.isdecimal() and int(step) < _SPECIAL_STEPS
    return seen.text(seen.launcher.local_rank) is not None and (seen.launcher is not _SLURM or in_step)


def _meeting(seen: _Seen, one_host: bool, agree: Callable[[bool], Rendezvous]) -> Rendezvous:
    """What the environment says goes before what can be found out."""
    address, port = seen.text(_ADDRESS), seen.text(_PORT)
    if not address or not port:
        found = _find_meeting(seen, one_host, agree)
        address, port = address or found.address, port or str(found.port)
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise seen.error(f"MASTER_PORT is no port from 1 to {2**16 - 1}")
    return Rendezvous(address, int(port))


def _find_meeting(seen: _Seen, one_host: bool, agree: Callable[[bool], Rendezvous]) -> Rendezvous:
    if seen.launcher is _TORCH:
        raise seen.error("MASTER_ADDR and MASTER_PORT, where ranks meet, are not both there")
    if seen.launcher is not _SLURM:
        return agree(one_host)
    hosts = seen.text(_HOST_LIST)
    if not hosts:
        raise seen.error(f"none of {', '.join(_HOST_LIST)} names the hosts, and there is no MASTER_ADDR")
    ports = seen.number(_JOB) * _PORTS_A_JOB + seen.number(_STEP) % _PORTS_A_JOB
    return Rendezvous(first_host(hosts), _FIRST_PORT + ports % _NUM_PORTS)
