"""MPI ranks: the bytes of one process, an end for all when one fails, and a clear word where MPI is half there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bipe.errors import DataError
from preprocessing import ranks
from preprocessing.ranks import Ranks, join_ranks

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
def test_preprocess_any_number_of_ranks_gives_the_bytes_of_one_process(
    tmp_path: Path, tokenizer_folder: Path, corpus: Path
) -> None:
    common = ["--input", corpus, "--tokenizer", tokenizer_folder, "--shard-tokens", 250_000, "--deduplicate"]
    common += ["--partition-by", "set", "--split", "train=0.9,valid=0.1"]
    for num_ranks, workers in ((0, 1), (2, 1), (3, 2)):
        done = run(num_ranks, *common, "--output", tmp_path / str(num_ranks), "--workers", workers)
        assert done.returncode == 0, done.stderr
        assert f"{corpus}, line 5001: no JSON" in done.stderr
        assert done.stdout.count("documents") == 6  # said once, by rank 0
    assert content(tmp_path / "2") == content(tmp_path / "0")
    assert content(tmp_path / "3") == content(tmp_path / "0")
    manifest = json.loads(content(tmp_path / "0")["train/s0/manifest.json"])
    assert manifest["source"]["duplicate_texts"] == 500
    assert manifest["source"]["partition"] == "S0" and manifest["source"]["split"] == "train"


@needs_mpi
def test_preprocess_rank_that_fails_ends_all_and_the_work_goes_on_later(
    tmp_path: Path, tokenizer_folder: Path, corpus: Path
) -> None:
    common = ["--input", corpus, "--tokenizer", tokenizer_folder, "--shard-tokens", 250_000]
    whole = run(0, *common, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    good = corpus.read_bytes()
    status = corpus.stat()
    corpus.write_bytes(good[: len(good) * 3 // 4] + b"\nx" * (len(good) // 8))
    corpus.write_bytes(corpus.read_bytes().ljust(len(good), b"\n")[: len(good)])
    os.utime(corpus, ns=(status.st_atime_ns, status.st_mtime_ns))
    failed = run(2, *common, "--output", tmp_path / "out")
    assert failed.returncode == 2, failed.stderr
    assert "lines are malformed" in failed.stderr and "(rank 1 of 2)" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_join_ranks_without_mpi_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ranks.LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with join_ranks() as found:
        assert (found.rank, found.size) == (0, 1)


def test_join_ranks_mpi_job_without_mpi4py_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(DataError, match="mpi4py cannot be loaded"), join_ranks():
        pass


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
