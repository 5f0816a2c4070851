"""Ranges done by this process or by several, each with a run of neighbouring ranges of its own.

Neighbours in one compressed file are read without going back. A worker that has finished its run takes over the
second half of the longest one left, so all end at about the same time. What crosses between processes is numbers.
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
TELL_BYTES = 1 << 23  # of text between two messages about progress


def do_ranges(job: Job, task: Task, numbers: Sequence[int], workers: int, advance: Advance) -> Iterator[int]:
    """Do a task for each range, yielding its number when it is done, in any order.

    Args:
        job: what to do.
        task: a method of `RangeWorker`.
        numbers: of the ranges, ascending.
        workers: processes; 1 works in this process.
        advance: told bytes read from disk and bytes of text.

    Raises:
        DataError: as the task does; or a worker process died.
    """
    if workers == 1 or len(numbers) < 2:
        with RangeWorker(job, advance) as worker:
            for number in numbers:
                getattr(worker, task)(number)
                yield number
        return
    weights = [range_weight(job.ranges[number]) for number in numbers]
    runs = share_out(list(numbers), weights, min(workers, len(numbers)))
    yield from _Pool(job, task, runs, advance).results()


def share_out(numbers: list[int], weights: list[float], count: int) -> list[list[int]]:
    """Cut a row of ranges into `count` runs of about equal weight; a run may be empty."""
    runs: list[list[int]] = [[] for _ in range(count)]
    total, passed = sum(weights), 0.0
    for number, weight in zip(numbers, weights, strict=True):
        runs[min(int((passed + weight / 2) * count / total) if total else 0, count - 1)].append(number)
        passed += weight
    return runs


def range_weight(pieces: Sequence[Piece]) -> float:
    """How much work a range is: its text, about."""
    return sum((piece.stop - piece.start) * piece.input.kind.text_share for piece in pieces)


class _Pool:
    """Worker processes and what each has still to do."""

    def __init__(self, job: Job, task: Task, runs: list[list[int]], advance: Advance) -> None:
        self._runs = [deque(run) for run in runs]
        self._advance = advance
        self._at: dict[Connection, int] = {}  # a worker's number by its connection
        self._doing: dict[int, int] = {}  # range by worker
        self._processes: list[BaseProcess] = []
        context = get_context("spawn")
        for number in range(len(runs)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(job, task, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._at[ours] = number
        self._job = job

    def results(self) -> Iterator[int]:
        """Numbers of finished ranges as they come; ends the processes however it ends."""
        try:
            for connection in list(self._at):
                self._hand_out(connection)
            while self._at:
                for ready in wait(list(self._at)):
                    assert isinstance(ready, Connection)
                    yield from self._receive(ready)
        finally:
            if self._at:  # something went wrong: what they do is not wanted any more
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
    """A worker process: do the ranges that are asked for until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent alone answers Ctrl-C
    leave_with_parent()
    advance = _Teller(connection)
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


class _Teller:
    """Sends progress on, not more often than is worth a message."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._read_bytes = self._text_bytes = 0

    def __call__(self, read_bytes: int, text_bytes: int) -> None:
        self._read_bytes += read_bytes
        self._text_bytes += text_bytes
        if self._read_bytes + self._text_bytes > TELL_BYTES:
            self.flush()

    def flush(self) -> None:
        self._connection.send(("advance", self._read_bytes, self._text_bytes))
        self._read_bytes = self._text_bytes = 0
