"""Ranges are divided evenly, taken over from slower workers, and finished later if a worker dies."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import pytest

from megatron_bipe.errors import DataError
from preprocessing import workers
from preprocessing.build import BuildOptions, build
from preprocessing.readers import inputs as inputs_module
from preprocessing.readers.inputs import KINDS, Input, Piece
from preprocessing.workers import _Worker, split_evenly
from tests.helpers.commands import MARK, left_after, marked
from tests.helpers.errors import raises
from tests.helpers.paths import ROOT

PIECE = Piece(Input("in.jsonl", KINDS[".jsonl"], 100, ""), 50, 100)


def workers_of(*slices: list[int]) -> list[_Worker]:
    """Make workers without processes; each is processing range 0."""
    workers = [object.__new__(_Worker) for _ in slices]
    for worker, numbers in zip(workers, slices, strict=True):
        worker.job, worker.current = mock.Mock(ranges=[[PIECE]] * 10), 0
        worker.remaining, worker.connection = deque(numbers), mock.Mock()
        worker.process = mock.Mock(exitcode=-9)
    return workers


def sent_next(worker: _Worker, workers: list[_Worker]) -> int | None:
    assert worker.send_next(workers) == (worker.connection.send.call_args.args[0] is not None)
    number: int | None = worker.connection.send.call_args.args[0]
    return number


@pytest.mark.parametrize(
    ("weights", "count", "slices"),
    [
        ([1.0, 1.0, 1.0, 1.0], 2, [[0, 1], [2, 3]]),
        ([1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 8.0, 1.0], 3, [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9]]),
        ([4.0, 1.0, 1.0], 2, [[0], [1, 2]]),
        ([1.0], 3, [[], [0], []]),
        ([1.0, 0.0], 2, [[], [0, 1]]),
        ([0.0, 0.0], 2, [[0, 1], []]),
        ([], 2, [[], []]),
    ],
)
def test_split_evenly_gives_neighbours_and_like_weights(
    weights: list[float], count: int, slices: list[list[int]]
) -> None:
    assert split_evenly(list(range(len(weights))), weights, count) == slices


def test_worker_that_has_finished_takes_the_second_half_of_the_longest_slice() -> None:
    first, second, third = workers = workers_of([], [1, 2, 3, 4, 5], [6, 7])
    assert [sent_next(first, workers) for _ in range(3)] == [3, 4, 5]
    assert [sent_next(worker, workers) for worker in (first, third)] == [2, 6]
    assert [sent_next(third, workers) for _ in range(3)] == [7, 1, None]
    assert sent_next(second, workers) is None and sent_next(first, workers) is None


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError])
def test_worker_that_dies_at_work_is_an_error(error: type[Exception]) -> None:
    (worker,) = workers_of([1])
    worker.connection.recv.side_effect = error
    with raises(DataError, "exit code -9", location="in.jsonl, from byte 50", remedy="--workers"):
        worker.receive()


@pytest.mark.parametrize("numbers", [[1], []])
def test_worker_that_is_dead_when_it_is_sent_a_range_is_an_error(numbers: list[int]) -> None:
    (worker,) = workers_of(numbers)
    worker.connection.send.side_effect = BrokenPipeError
    with raises(DataError, "exit code -9", location="in.jsonl, from byte 50", remedy="--workers"):
        worker.send_next([worker])


@pytest.fixture
def options(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> BuildOptions:
    """Four ranges."""
    monkeypatch.setattr(inputs_module, "LEAST_RANGE_TEXT_BYTES", 5000)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"{n} words ." * 5}) + "\n" for n in range(250)))
    return BuildOptions([str(tmp_path / "in.jsonl")], str(tokenizer_folder), tmp_path / "out", workers=2)


def test_process_ranges_worker_that_dies_ends_the_others_and_the_next_run_resumes(options: BuildOptions) -> None:
    terminate = BaseProcess.terminate
    with (
        mock.patch.object(workers, "_work", _die),
        mock.patch.object(BaseProcess, "terminate", autospec=True, side_effect=terminate) as ended,
        raises(DataError, "exit code -9", remedy="--workers"),
    ):
        build(options)
    assert ended.call_count == 2 and not multiprocessing.active_children()
    (manifest,) = build(options).values()
    assert manifest.num_documents == 250


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ORPHAN = """
import multiprocessing, sys, types
from pathlib import Path
from preprocessing.workers import _work

context = multiprocessing.get_context("fork")  # so that it holds both ends, and would wait for ever
_, theirs = context.Pipe()
job = types.SimpleNamespace(output=Path(sys.argv[1]), keys=None)
context.Process(target=_work, args=(job, "tokenize", theirs)).start()
print("started", flush=True)
sys.stdin.read()
"""


def test_work_ends_with_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
        parent.kill()
        try:
            parent.communicate(timeout=30)  # until the last process that holds the other end is gone
        except subprocess.TimeoutExpired:
            os.killpg(parent.pid, signal.SIGKILL)
            raise


def test_preprocess_leaves_no_workers_however_it_ends(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n} words of a text .\n" * 40}) + "\n" for n in range(30_000)))
    marks, started = [uuid.uuid4().hex for _ in range(3)], []
    for mark in marks:
        paths = ["--input", str(file), "--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / mark)]
        command = [sys.executable, str(ROOT / "tools" / "preprocess.py"), *paths, "--workers", "2"]
        with (tmp_path / f"{mark}.log").open("w") as log:
            started.append(subprocess.Popen(command, env=os.environ | {MARK: mark}, stdout=log, stderr=log))
    waiting = list(zip(marks, started, (signal.SIGINT, signal.SIGTERM, signal.SIGKILL), strict=True))
    while waiting:  # for the workers of any: the others work on meanwhile, and would be done
        for one in waiting[:]:
            mark, parent, number = one
            if sum(b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in marked(mark)) >= 2:
                parent.send_signal(number)
                waiting.remove(one)
            else:
                assert parent.poll() is None
        time.sleep(0.02)
    assert not left_after(marks, 10)
    logs = [(tmp_path / f"{mark}.log").read_text() for mark in marks]
    assert 0 not in [parent.wait() for parent in started], "\n".join(logs)
