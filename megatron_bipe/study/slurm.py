"""The runs of a study as a SLURM job array: one task trains and evaluates one run."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE, CompletedProcess
from typing import Any

from megatron_bipe.errors import BipeError, ConfigError
from megatron_bipe.io import write_atomically
from megatron_bipe.runtime.child_processes import run_command

FOLDER = Path("slurm")  # in the folder of the study
RECORD_NAME, SCRIPT_NAME = "submitted.json", "array.sbatch"
_UNKNOWN_JOB = "Invalid job id"  # squeue's answer for a job that ended a while ago


def array_script(runs: Sequence[str], command: Sequence[str], folder: Path, options: Sequence[str]) -> str:
    """Return a batch script for `sbatch --array`.

    Args:
        runs: names of the runs, in the order of the array's task numbers.
        command: words of the command that trains and evaluates the run whose name follows.
        folder: absolute folder of the study, for the tasks' logs.
        options: options of sbatch, such as `--partition=gpu`.
    """
    directives = ["--job-name=study", f"--output={folder / FOLDER}/%A_%a.log", "--open-mode=append", *options]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {directive}" for directive in directives),
            "set -euo pipefail",
            f"cd {shlex.quote(str(Path.cwd()))}",
            f"runs=({shlex.join(runs)})",
            f'exec {shlex.join(command)} "${{runs[$SLURM_ARRAY_TASK_ID]}}"',
            "",
        ]
    )


def submit(
    runs: Sequence[str], command: Sequence[str], folder: Path, options: Sequence[str], at_once: int | None
) -> str:
    """Submit an array with one task per run, and record it; arguments are those of `array_script`.

    Returns:
        The number of the job.

    Raises:
        BipeError: sbatch is missing or fails.
    """
    script = folder / FOLDER / SCRIPT_NAME
    script.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(script, array_script(runs, command, folder.absolute(), options).encode())
    limit = f"%{at_once}" if at_once else ""
    answer = _ask(["sbatch", "--parsable", f"--array=0-{len(runs) - 1}{limit}", str(script)])
    job = answer.stdout.strip().partition(";")[0]
    if answer.returncode != 0 or not job.isdigit():
        text = (answer.stderr or answer.stdout).strip()
        raise BipeError(
            f"sbatch did not accept the array, with exit code {answer.returncode}: {text!r}",
            remedy="Correct the options after --slurm",
            location=script,
        )
    write_atomically(folder / FOLDER / RECORD_NAME, json.dumps({"job": job, "runs": list(runs)}, indent=1).encode())
    return job


def queued_job(folder: Path) -> str | None:
    """Return the number of the study's last array if it is still waiting or running.

    Raises:
        BipeError: SLURM does not answer, or the record is damaged.
    """
    path = folder / FOLDER / RECORD_NAME
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        job = str(record["job"])
    except (ValueError, KeyError, TypeError) as error:
        remedy = "Remove it once squeue shows no job of this study"
        raise BipeError("the record of the submitted array is damaged", remedy=remedy, location=path) from error
    answer = _ask(["squeue", "--noheader", "--jobs", job])
    if answer.returncode != 0 and _UNKNOWN_JOB not in answer.stderr:
        raise BipeError(
            f"squeue failed with exit code {answer.returncode}: {answer.stderr.strip()!r}",
            remedy="Run the same command again when SLURM answers",
            location=f"job {job}",
            transient=True,
        )
    return job if answer.returncode == 0 and answer.stdout.strip() else None


def _ask(command: Sequence[str]) -> "CompletedProcess[str]":
    try:
        return run_command(command, stdout=PIPE, stderr=PIPE)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{command[0]} is not on the PATH", remedy="Run this on a login node of the cluster", location="--slurm"
        ) from error
