"""Job arrays: the script that sbatch receives, what it answers, and whether an array is still queued."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bipe.errors import BipeError, ConfigError
from megatron_bipe.study.slurm import queued_job, submit
from tests.helpers.errors import raises

RUNS = ["rope/seed-1", "bipe_rope-fixed-16/seed-2"]
COMMAND = ["python", "tools/study.py", "a study.yaml", "--member"]
WriteProgram = Callable[[str, str], None]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteProgram:
    """Write a program that is found before those of the system."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)

    return write


def test_submit_passes_a_task_for_each_run(program: WriteProgram, tmp_path: Path) -> None:
    program("sbatch", f'printf "%s\\n" "$@" > {tmp_path}/given; echo "417;cluster"')
    assert submit(RUNS, COMMAND, tmp_path / "out", ["--partition=gpu", "--time=1:00:00"], at_once=3) == "417"
    given = (tmp_path / "given").read_text().splitlines()
    assert given[:2] == ["--parsable", "--array=0-1%3"]
    assert {"#SBATCH --partition=gpu", "#SBATCH --time=1:00:00"} <= set(Path(given[2]).read_text().splitlines())
    assert json.loads((tmp_path / "out" / "slurm" / "submitted.json").read_text()) == {"job": "417", "runs": RUNS}


def test_task_runs_the_run_of_its_number(program: WriteProgram, tmp_path: Path) -> None:
    program("sbatch", "echo 1")
    program("python", 'pwd; printf "%s\\n" "$@"')
    submit(RUNS, COMMAND, tmp_path, [], at_once=None)
    script = tmp_path / "slurm" / "array.sbatch"
    for number, run in enumerate(RUNS):
        env = os.environ | {"SLURM_ARRAY_TASK_ID": str(number)}
        done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout.splitlines() == [str(Path.cwd()), *COMMAND[1:], run]


def test_submit_that_is_refused_is_an_error_and_records_nothing(program: WriteProgram, tmp_path: Path) -> None:
    program("sbatch", "echo 'invalid partition' >&2; exit 1")
    with raises(BipeError, "invalid partition", 1, location="array.sbatch", remedy="--slurm"):
        submit(RUNS, COMMAND, tmp_path, [], at_once=None)
    assert queued_job(tmp_path) is None


def test_submit_without_slurm_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with raises(ConfigError, "sbatch", location="--slurm"):
        submit(RUNS, COMMAND, tmp_path, [], at_once=None)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo 417_1 R", "417"),
        ("true", None),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", None),
    ],
)
def test_queued_job_is_what_squeue_lists(
    program: WriteProgram, tmp_path: Path, answer: str, expected: str | None
) -> None:
    program("sbatch", "echo 417")
    submit(RUNS, COMMAND, tmp_path, [], at_once=None)
    program("squeue", f'[ "$*" = "--noheader --jobs 417" ] || exit 9; {answer}')
    assert queued_job(tmp_path) == expected


def test_queue_that_does_not_answer_is_an_error(program: WriteProgram, tmp_path: Path) -> None:
    program("sbatch", "echo 417")
    submit(RUNS, COMMAND, tmp_path, [], at_once=None)
    program("squeue", "echo 'Socket timed out' >&2; exit 1")
    with raises(BipeError, "Socket timed out", location="job 417") as caught:
        queued_job(tmp_path)
    assert caught.value.transient


@pytest.mark.parametrize("content", ["", "[]", '{"runs": []}'])
def test_damaged_record_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "submitted.json").write_text(content)
    with raises(BipeError, location="submitted.json"):
        queued_job(tmp_path)
