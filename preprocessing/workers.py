"""Process ranges in this process or in several, each with its own contiguous slice of the ranges.

Consecutive ranges of a compressed file are read without seeking back. A worker that has finished its slice takes the
second half of the longest remaining one, so all end at about the same time. Only numbers cross between processes.
"""

import signal
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Literal

from megatron_bipe.errors import BipeError, DataError
from megatron_bipe.io import locked
from megatron_bipe.runtime.child_processes import leave_with_parent
from preprocessing.range_worker import Advance, Job, RangeWorker
from preprocessing.readers.inputs import Piece
from preprocessing.work_dir import WorkFolder

Task = Literal["hash_texts", "tokenize"]
REPORT_BYTES = 1 << 23  # between two messages about progress


def do_ranges(job: Job, task: Task, numbers: Sequence[int], workers: int, advance: Advance) -> Iterator[int]:
    """Run a method of `RangeWorker` for each range, and yield its number when it is done, in any order.

    The numbers are ascending. One worker means this process.

    Raises:
        DataError: the task failed, or a worker process died.
    """
    if workers == 1 or len(numbers) < 2:
        with RangeWorker(job, advance) as worker:
            for number in numbers:
                getattr(worker, task)(number)
                yield number
        return
    weights = [range_weight(job.ranges[number]) for number in numbers]
    slices = split_evenly(list(numbers), weights, min(workers, len(numbers)))
    yield from _Pool(job, task, slices, advance).results()


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


class _Pool:
    """Worker processes and the remaining ranges of each."""

    def __init__(self, job: Job, task: Task, slices: list[list[int]], advance: Advance) -> None:
        self._runs = [deque(numbers) for numbers in slices]
        self._advance = advance
        self._at: dict[Connection, int] = {}  # connection -> worker
        self._doing: dict[int, int] = {}  # worker -> range
        self._processes: list[BaseProcess] = []
        context = get_context("spawn")
        for number in range(len(slices)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(job, task, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._at[ours] = number
        self._job = job

    def results(self) -> Iterator[int]:
        """Yield the numbers of finished ranges; at the end, also by an exception, stop the processes."""
        try:
            for connection in list(self._at):
                self._hand_out(connection)
            while self._at:
                for ready in wait(list(self._at)):
                    assert isinstance(ready, Connection)
                    yield from self._receive(ready)
        finally:
            if self._at:  # after a failure, the remaining work is abandoned
                for process in self._processes:
                    process.terminate()
            for connection in self._at:
                connection.close()
            for process in self._processes:
                process.join()

    def _receive(self, connection: Connection) -> Iterator[int]:
        try:
            kind, *content = connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died(connection) from error
        if kind == "advance":
            self._advance(*content)
        elif kind == "done":
            self._hand_out(connection)
            yield content[0]
        else:
            raise content[0]

    def _hand_out(self, connection: Connection) -> None:
        worker = self._at[connection]
        if not self._runs[worker]:
            longest = max(self._runs, key=len)
            taken = [longest.pop() for _ in range((len(longest) + 1) // 2)]
            self._runs[worker].extend(reversed(taken))
        number = self._runs[worker].popleft() if self._runs[worker] else None
        self._doing[worker] = self._doing[worker] if number is None else number
        try:
            connection.send(number)
        except OSError as error:
            raise self._died(connection) from error
        if number is None:
            del self._at[connection]
            connection.close()

    def _died(self, connection: Connection) -> DataError:
        worker = self._at[connection]
        process = self._processes[worker]
        process.join()
        piece = self._job.ranges[self._doing[worker]][0]
        return DataError(
            f"A worker process died (exit code {process.exitcode}; a code of -9 most often means that the system was "
            "out of memory)",
            remedy="Run the same command again, with fewer --workers if memory was short: finished shards are kept",
            location=f"{piece.input.name}, from byte {piece.start}",
        )


def _work(job: Job, task: Task, connection: Connection) -> None:
    """Run, in a worker process, the ranges that the parent asks for until there are no more."""
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
