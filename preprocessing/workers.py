"""Divide the ranges of a job among MPI ranks and worker processes, and process them.

Each rank, and each of its workers, has its own contiguous slice, because consecutive ranges of a compressed file are
read without seeking back. A worker that has finished its slice takes the second half of the longest remaining one, so
all end at about the same time. Processes exchange only the numbers of ranges and their progress.

`concurrent.futures` is not used: it gives the next range to whichever process is idle, and when a process dies, it
reports neither its exit code nor its range.
"""

import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, TypeVar

from megatron_bipe.errors import BipeError, DataError
from megatron_bipe.io import locked
from megatron_bipe.runtime.child_processes import leave_with_parent
from preprocessing.range_worker import Advance, Job, RangeWorker
from preprocessing.readers.inputs import Piece
from preprocessing.work_dir import WorkFolder

# Set for every process of a job by Open MPI, MPICH and Intel MPI, and Slurm's `srun --mpi=pmix`.
LAUNCH_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
REPORT_BYTES = 1 << 23  # between two messages about progress

Task = Literal["hash_texts", "tokenize"]  # methods of `RangeWorker`
Result = TypeVar("Result")


class Ranks:
    """Rank of this process, size of its MPI job, and collectives; without a communicator, a single process.

    Ranks share a file system: each processes its own ranges, and they synchronize at barriers.
    """

    def __init__(self, communicator: Any = None) -> None:
        self._communicator = communicator
        self.rank = communicator.Get_rank() if communicator else 0
        self.size = communicator.Get_size() if communicator else 1

    def run_on_first(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0, and return its result on all ranks."""
        result = work() if self.rank == 0 else None
        if self._communicator is not None:
            result = self._communicator.bcast(result)
        return result  # type: ignore[return-value]

    def wait_for_all(self) -> None:
        """Wait until all ranks have called this."""
        if self._communicator is not None:
            self._communicator.Barrier()


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the MPI job that started this process, or yield a single rank.

    A rank that fails ends the others, which would wait for it forever; finished ranges are kept.

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
    except BaseException as error:
        if ranks.size == 1:
            raise
        if isinstance(error, BipeError):
            message, code = f"{type(error).__name__}: {error}  (rank {ranks.rank} of {ranks.size})", 2
        else:
            sys.excepthook(*sys.exc_info())
            message, code = f"Rank {ranks.rank} of {ranks.size} failed", 1
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(code)


def split_evenly(numbers: list[int], weights: list[float], count: int) -> list[list[int]]:
    """Split ranges into `count` contiguous slices of about equal weight; a slice may be empty."""
    slices: list[list[int]] = [[] for _ in range(count)]
    total, before = sum(weights), 0.0
    for number, weight in zip(numbers, weights, strict=True):
        slices[min(int((before + weight / 2) * count / total) if total else 0, count - 1)].append(number)
        before += weight
    return slices


def range_weight(pieces: Sequence[Piece]) -> float:
    """Return the approximate bytes of text of a range, as a measure of its work."""
    return sum((piece.stop - piece.start) * piece.input.kind.text_share for piece in pieces)


def process_ranges(job: Job, task: Task, numbers: list[int], num_workers: int, advance: Advance) -> Iterator[int]:
    """Run the task for each range, and yield its number when it is done, in any order.

    The numbers must be ascending. With one worker, this process does the work. Worker processes are stopped at the end
    and on an exception.

    Raises:
        DataError: the task failed, or a worker process died.
    """
    if num_workers == 1 or len(numbers) < 2:
        with RangeWorker(job, advance) as range_worker:
            for number in numbers:
                getattr(range_worker, task)(number)
                yield number
        return
    weights = [range_weight(job.ranges[number]) for number in numbers]
    slices = split_evenly(numbers, weights, min(num_workers, len(numbers)))
    workers = [_Worker(job, task, part) for part in slices]
    busy: dict[object, _Worker] = {worker.connection: worker for worker in workers}
    try:
        for worker in workers:
            worker.send_next(workers)
        while busy:
            for connection in wait([worker.connection for worker in busy.values()]):
                kind, *content = busy[connection].receive()
                if kind == "advance":
                    advance(*content)
                elif kind == "failed":
                    raise content[0]
                else:
                    if not busy[connection].send_next(workers):
                        del busy[connection]
                    yield content[0]
    finally:
        for worker in workers:
            if busy:  # after a failure, the remaining work is abandoned
                worker.process.terminate()
            worker.connection.close()
        for worker in workers:
            worker.process.join()


class _Worker:
    """Worker process, and the ranges of its slice that it has not begun."""

    def __init__(self, job: Job, task: Task, numbers: list[int]) -> None:
        self.job, self.remaining, self.current = job, deque(numbers), 0
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(job, task, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died_error() from error

    def send_next(self, workers: Sequence["_Worker"]) -> bool:
        """Send the number of the next range, or None if no worker has a remaining one; return False then."""
        if not self.remaining:
            longest = max((worker.remaining for worker in workers), key=len)
            half = [longest.pop() for _ in range((len(longest) + 1) // 2)]
            self.remaining.extend(reversed(half))
        number = self.remaining.popleft() if self.remaining else None
        self.current = self.current if number is None else number
        try:
            self.connection.send(number)
        except OSError as error:
            raise self._died_error() from error
        return number is not None

    def _died_error(self) -> DataError:
        self.process.join()
        piece = self.job.ranges[self.current][0]
        return DataError(
            f"A worker process died (exit code {self.process.exitcode}; a code of -9 most often means that the system "
            "was out of memory)",
            remedy="Run the same command again, with fewer --workers if memory was short: finished shards are kept",
            location=f"{piece.input.name}, from byte {piece.start}",
        )


def _work(job: Job, task: Task, connection: Connection) -> None:
    """Run, in a worker process, the ranges that the parent sends until it sends None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles Ctrl-C
    leave_with_parent()
    advance = _ProgressSender(connection)
    with locked(WorkFolder(job.output).path), RangeWorker(job, advance) as worker:
        while (number := connection.recv()) is not None:
            try:
                getattr(worker, task)(number)
            except BipeError as error:
                connection.send(("failed", error))
                return
            except BaseException:
                connection.send(("failed", RuntimeError(f"A worker process failed:\n{traceback.format_exc()}")))
                return
            advance.flush()
            connection.send(("done", number))


class _ProgressSender:
    """Callback that sends progress to the parent, at most once per `REPORT_BYTES`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._read_bytes = self._text_bytes = 0

    def __call__(self, read_bytes: int, text_bytes: int) -> None:
        self._read_bytes += read_bytes
        self._text_bytes += text_bytes
        if self._read_bytes + self._text_bytes > REPORT_BYTES:
            self.flush()

    def flush(self) -> None:
        self._connection.send(("advance", self._read_bytes, self._text_bytes))
        self._read_bytes = self._text_bytes = 0
