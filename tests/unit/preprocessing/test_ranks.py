"""MPI ranks: the bytes of one process, an end for all when one fails, and a clear word where MPI is half there."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from megatron_bipe.data.manifest import Manifest
from megatron_bipe.errors import DataError
from preprocessing import duplicates, ranks
from preprocessing.build import BuildOptions, build
from preprocessing.range_worker import RangeWorker
from preprocessing.ranks import Ranks, join_ranks
from preprocessing.readers import inputs as inputs_module
from preprocessing.work_dir import PUBLISHED_NAME, WorkFolder
from tests.helpers.errors import raises

PREPROCESS = Path(__file__).resolve().parents[3] / "tools" / "preprocess.py"
MPIEXEC = Path(sys.executable).parent / "mpiexec"
needs_mpi = pytest.mark.skipif(not MPIEXEC.exists() and not shutil.which("mpiexec"), reason="there is no mpiexec")


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run(num_ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = str(MPIEXEC) if MPIEXEC.exists() else "mpiexec"
    prefix = [launcher, "--oversubscribe", "-n", str(num_ranks)] if num_ranks else []
    command = [*prefix, sys.executable, str(PREPROCESS), *map(str, arguments)]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run(command, env=os.environ | as_root, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """4 MB, so four ranges; texts repeat, and some lines are malformed."""
    file = tmp_path / "in.jsonl"
    lines = [json.dumps({"text": f"{n % 9000} words of a text .\n" * 20, "set": f"S{n % 3}"}) for n in range(9500)]
    lines[5000] = "bad"
    file.write_text("\n".join(lines))
    return file


@needs_mpi
def test_preprocess_ranks_with_workers_give_the_bytes_of_one_process(
    tmp_path: Path, tokenizer_folder: Path, corpus: Path
) -> None:
    more = {"partition_by": "set", "split": "train=0.9,valid=0.1", "shard_tokens": 250_000, "deduplicate": True}
    build(BuildOptions([str(corpus)], str(tokenizer_folder), tmp_path / "one", **more))
    options = ["--input", corpus, "--tokenizer", tokenizer_folder, "--shard-tokens", 250_000, "--deduplicate"]
    options += ["--partition-by", "set", "--split", "train=0.9,valid=0.1", "--workers", 2]
    done = run(3, *options, "--output", tmp_path / "three")
    assert done.returncode == 0, done.stderr
    assert f"{corpus}, line 5001: no JSON" in done.stderr
    assert done.stdout.count("documents") == 6  # said once, by rank 0
    assert content(tmp_path / "three") == content(tmp_path / "one")
    manifest = json.loads(content(tmp_path / "one")["train/s0/manifest.json"])
    assert manifest["source"]["duplicate_texts"] == 500
    assert manifest["source"]["partition"] == "S0" and manifest["source"]["split"] == "train"


@needs_mpi
@pytest.mark.slow
def test_preprocess_rank_that_fails_ends_all_and_the_work_goes_on_later(
    tmp_path: Path, tokenizer_folder: Path, corpus: Path
) -> None:
    good, status = corpus.read_bytes(), corpus.stat()
    damaged = good[: len(good) * 3 // 4] + b"\nx" * (len(good) // 8)
    corpus.write_bytes(damaged.ljust(len(good), b"\n")[: len(good)])
    os.utime(corpus, ns=(status.st_atime_ns, status.st_mtime_ns))
    options = ["--input", corpus, "--tokenizer", tokenizer_folder, "--shard-tokens", 250_000]
    failed = run(2, *options, "--output", tmp_path / "out")
    assert failed.returncode == 2, failed.stderr
    assert "lines are malformed" in failed.stderr and "(rank 1 of 2)" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list((tmp_path / "out").rglob("manifest.json"))


class World:
    """What mpi4py's world does, for ranks that are threads."""

    def __init__(self, rank: int, barrier: threading.Barrier, said: list[object]) -> None:
        self._rank, self._barrier, self._said = rank, barrier, said

    def Get_rank(self) -> int:  # noqa: N802
        return self._rank

    def Get_size(self) -> int:  # noqa: N802
        return self._barrier.parties

    def Barrier(self) -> None:  # noqa: N802
        self._barrier.wait()

    def bcast(self, value: object) -> object:
        if self._rank == 0:
            self._said[:] = [pickle.dumps(value)]
        self._barrier.wait()
        value = pickle.loads(self._said[0])  # type: ignore[arg-type]
        self._barrier.wait()
        return value


def build_together(options: BuildOptions, num_ranks: int) -> list[dict[Path, Manifest]]:
    """What each rank's `build` returns; the first error where there is one."""
    barrier, said = threading.Barrier(num_ranks, timeout=60), []

    def one(rank: int) -> dict[Path, Manifest]:
        threading.current_thread().name = f"rank {rank}"
        try:
            return build(options, Ranks(World(rank, barrier, said)))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(num_ranks) as pool:
        ended = [pool.submit(one, rank) for rank in range(num_ranks)]
    errors = [error for future in ended if (error := future.exception())]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in ended]


@pytest.fixture
def options(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> BuildOptions:
    """Five ranges."""
    monkeypatch.setattr(inputs_module, "LEAST_RANGE_TEXT_BYTES", 8000)
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n % 250} words .\n" * 9}) + "\n" for n in range(260)))
    return BuildOptions([str(file)], str(tokenizer_folder), tmp_path / "out", deduplicate=True, split="a=0.8,b=0.2")


@pytest.fixture
def expected(options: BuildOptions, tmp_path: Path) -> dict[str, bytes]:
    build(replace(options, output=tmp_path / "one"))
    return content(tmp_path / "one")


@pytest.mark.parametrize("num_ranks", [1, 2, 9])
def test_build_any_number_of_ranks_gives_the_bytes_of_one_process(
    options: BuildOptions, expected: dict[str, bytes], num_ranks: int
) -> None:
    first, *others = build_together(options, num_ranks)
    assert len(first) == 2 and not any(others)
    assert content(options.output) == expected


def test_build_ranks_take_the_word_of_the_first_for_what_is_done(
    options: BuildOptions, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize, is_done, has_hashes = RangeWorker.tokenize, WorkFolder.is_done, duplicates.has_hashes
    numbers = []

    def failing(self: RangeWorker, number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt
        tokenize(self, number)

    monkeypatch.setattr(RangeWorker, "tokenize", failing)
    with pytest.raises(KeyboardInterrupt):
        build(options)

    def here() -> bool:
        """Whether a rank's view of the disk is of today."""
        return threading.current_thread().name == "rank 0"

    monkeypatch.setattr(RangeWorker, "tokenize", lambda self, number: numbers.append(number) or tokenize(self, number))
    monkeypatch.setattr(WorkFolder, "is_done", lambda self, number: here() and is_done(self, number))
    monkeypatch.setattr(duplicates, "has_hashes", lambda folder: here() and has_hashes(folder))
    build_together(options, 3)
    assert sorted(numbers) == [3, 4]
    assert content(options.output) == expected


def test_build_ranks_of_an_output_that_only_needs_tidying_agree(
    options: BuildOptions, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    has = WorkFolder.has

    def remove(self: WorkFolder) -> None:
        if self.has(PUBLISHED_NAME):
            raise KeyboardInterrupt

    with mock.patch.object(WorkFolder, "remove", remove), pytest.raises(KeyboardInterrupt):
        build(options)

    def late(self: WorkFolder, mark: str) -> bool:
        return threading.current_thread().name == "rank 0" and has(self, mark)

    monkeypatch.setattr(WorkFolder, "has", late)
    first, *others = build_together(options, 3)
    assert len(first) == 2 and not any(others)
    assert content(options.output) == expected


def test_build_rank_that_fails_leaves_what_is_done(options: BuildOptions, expected: dict[str, bytes]) -> None:
    tokenize = RangeWorker.tokenize

    def failing(self: RangeWorker, number: int) -> None:
        if threading.current_thread().name == "rank 1":
            raise DataError("no more")
        tokenize(self, number)

    with mock.patch.object(RangeWorker, "tokenize", failing), raises(DataError, "no more"):
        build_together(options, 2)
    assert WorkFolder(options.output).is_done(0)
    build_together(options, 2)
    assert content(options.output) == expected


def test_join_ranks_without_mpi_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ranks.LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with join_ranks() as found:
        assert (found.rank, found.size) == (0, 1)


def test_join_ranks_mpi_job_without_mpi4py_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with raises(DataError, "mpi4py", location="mpiexec", remedy="[mpi]"), join_ranks():
        pass


@pytest.fixture
def mpi(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """The world of an MPI job, of one rank."""
    world = mock.Mock(Get_rank=lambda: 0, Get_size=mock.Mock(return_value=1))
    monkeypatch.setitem(sys.modules, "mpi4py", mock.Mock(MPI=mock.Mock(COMM_WORLD=world)))
    monkeypatch.setenv("PMI_SIZE", "1")
    return world


def test_join_ranks_error_of_the_only_rank_is_raised(mpi: mock.Mock) -> None:
    for error in (DataError("no"), ValueError("no")):
        with pytest.raises(type(error)), join_ranks():
            raise error
    assert not mpi.Abort.called


def test_join_ranks_error_of_one_of_many_ends_all(mpi: mock.Mock, capsys: pytest.CaptureFixture[str]) -> None:
    mpi.Get_size.return_value = 3
    for error in (DataError("no"), ValueError("no")):
        with join_ranks() as found:
            assert found.size == 3
            raise error
    assert [call.args[0] for call in mpi.Abort.call_args_list] == [2, 1]
    message, _, trace = capsys.readouterr().err.partition("\n")
    assert message == "DataError: no.  (rank 0 of 3)"
    assert "ValueError: no\nRank 0 of 3 failed" in trace


def test_ranks_first_is_done_by_the_first_and_told_to_all() -> None:
    class Communicator:
        def Get_rank(self) -> int:  # noqa: N802
            return 1

        def Get_size(self) -> int:  # noqa: N802
            return 2

        def bcast(self, value: object) -> str:
            assert value is None
            return "from rank 0"

    assert Ranks(Communicator()).first(lambda: pytest.fail("rank 1 is not the first")) == "from rank 0"
    assert Ranks().first(lambda: 3) == 3
