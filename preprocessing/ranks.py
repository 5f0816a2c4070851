"""MPI ranks of preprocessing: `mpiexec -n N python tools/preprocess.py ...`.

Ranks share a file system: each processes its own ranges, and they synchronize at barriers. A rank that fails ends the
others; finished ranges are kept. No other module of preprocessing uses MPI.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from megatron_bipe.errors import BipeError, DataError

# Set for every process of a job by Open MPI, MPICH and Intel MPI, and Slurm's `srun --mpi=pmix`.
LAUNCH_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")

Result = TypeVar("Result")


class Ranks:
    """Rank of this process, size of its job, and collectives; without a communicator, a single process."""

    def __init__(self, communicator: Any = None) -> None:
        self._communicator = communicator
        self.rank = communicator.Get_rank() if communicator else 0
        self.size = communicator.Get_size() if communicator else 1

    def first(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0, and return its result on all ranks."""
        result = work() if self.rank == 0 else None
        if self._communicator is not None:
            result = self._communicator.bcast(result)
        return result  # type: ignore[return-value]

    def wait(self) -> None:
        """Wait until all ranks have called this."""
        if self._communicator is not None:
            self._communicator.Barrier()


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the MPI job that started this process, or yield a single rank.

    Raises:
        DataError: there is an MPI job, but mpi4py cannot be imported.
    """
    if not any(name in os.environ for name in LAUNCH_VARIABLES):
        yield Ranks()
        return
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise DataError(
            f"This process was started by MPI, but mpi4py cannot be loaded: {error}",
            remedy="Run pip install -e '.[mpi]', or start this without mpiexec and with --workers",
            location="mpiexec",
        ) from error
    ranks = Ranks(MPI.COMM_WORLD)
    try:
        yield ranks
    except BipeError as error:
        if ranks.size == 1:
            raise
        _end_all(f"{type(error).__name__}: {error}  (rank {ranks.rank} of {ranks.size})", 2)
    except BaseException:
        if ranks.size == 1:
            raise
        sys.excepthook(*sys.exc_info())
        _end_all(f"Rank {ranks.rank} of {ranks.size} failed", 1)


def _end_all(message: str, code: int) -> None:
    """Write a message, and end every rank: the others would wait for this one forever."""
    from mpi4py import MPI

    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    MPI.COMM_WORLD.Abort(code)
