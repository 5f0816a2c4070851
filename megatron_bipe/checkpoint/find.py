"""Locates the checkpoints of a run folder.

RUN/checkpoints/step-00000100/   checkpoint after 100 updates
RUN/checkpoints/latest           name of the newest one
"""

import re
from pathlib import Path
from typing import NamedTuple

from megatron_bipe.config import RunConfig
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.errors import CheckpointError
from megatron_bipe.io import read_again

POINTER = "latest"

_STEP = re.compile(r"step-(\d{8,})")


class Checkpoint(NamedTuple):
    """A checkpoint folder that exists."""

    folder: Path
    run_dir: Path
    step: int  # updates done


def find_checkpoint(spec: str | Path) -> Checkpoint:
    """Return the checkpoint that `RUN_DIR` (its newest) or `RUN_DIR@STEP` names.

    Raises:
        CheckpointError: there is no such run folder or checkpoint; the message lists the available steps.
    """
    run_dir, wanted = split_step(spec)
    found = {str(step): step for step in list_steps(run_dir)}
    if not wanted and found:
        return newest_first(run_dir)[0]
    if wanted not in found:
        listed = ", ".join(found) or "none"
        raise CheckpointError(
            f"no checkpoint {'of step ' + wanted if wanted else 'was found'}; available steps: {listed}",
            remedy="Name a run folder made by pretrain.py, or RUN_DIR@STEP",
            location=spec,
        )
    return Checkpoint(step_folder(run_dir, found[wanted]), run_dir, found[wanted])


def split_step(spec: str | Path) -> tuple[Path, str]:
    """Return the run folder and the step that `RUN_DIR[@STEP]` names; "" without a step."""
    name, at, step = str(spec).rpartition("@")
    if Path(spec).is_dir() or not at:  # a folder's own name may have an @
        return Path(spec), ""
    return Path(name), step


def find_trunk(spec: str) -> Checkpoint:
    """Return the checkpoint `RUN_DIR@STEP` that a run branches from.

    Raises:
        CheckpointError: there is no such run folder or checkpoint, or no step is named.
    """
    run_dir, step = split_step(spec)
    if is_run_dir(run_dir) and not step:
        steps = list_steps(run_dir)
        raise CheckpointError(
            f"train.branch_from={spec} names no step, so a later start could begin from another one; available steps: "
            f"{', '.join(map(str, steps)) or 'none'}",
            remedy=f"Name the step: train.branch_from={spec}@{steps[-1] if steps else 'STEP'}",
            location="train.branch_from",
        )
    return find_checkpoint(spec)


def branch_step(run: RunConfig) -> int:
    """Return the step after which a new run begins, without reading any file; 0 unless it is a branch."""
    step = split_step(run.train.branch_from)[1] if run.train.branch_from else ""
    return int(step) if step.isdecimal() else 0


def num_own_steps(run: RunConfig) -> int:
    """Return the number of steps that a run trains: of a branch, those after the step that it begins with."""
    return max(0, run.train.steps - branch_step(run))


def find_model(spec: str) -> Checkpoint | None:
    """Resolve the folder of an exported model, or `RUN_DIR[@STEP]`.

    Returns:
        The named checkpoint, or None for an exported model.

    Raises:
        CheckpointError: `spec` names neither.
    """
    if (Path(spec) / "config.json").is_file():
        return None
    run_dir = Path(spec if Path(spec).exists() else spec.rpartition("@")[0] or spec)
    if is_run_dir(run_dir):
        return find_checkpoint(spec)
    seen = "neither an exported model (config.json) nor a run folder" if run_dir.exists() else "no such folder"
    raise CheckpointError(
        seen,
        remedy="Name a folder made by tools/export_hf.py or tools/import_hf.py, or RUN_DIR[@STEP] of pretrain.py",
        location=spec,
    )


def newest_first(run_dir: Path) -> list[Checkpoint]:
    """Return all checkpoints of a run, in the order in which they should be tried.

    The one that `latest` names comes first, then earlier ones, then later ones, which a rolled-back run has left. If
    `latest` is missing or invalid, the order starts at the last step.
    """
    steps = list_steps(run_dir)
    pointed = _pointed_at(run_dir)
    newest = pointed if pointed in steps else max(steps, default=0)
    order = [step for step in reversed(steps) if step <= newest] + [step for step in reversed(steps) if step > newest]
    return [Checkpoint(step_folder(run_dir, step), run_dir, step) for step in order]


def is_run_dir(path: Path) -> bool:
    """Return True if the folder has a resolved configuration and a folder of checkpoints, as pretrain.py makes them."""
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def list_steps(run_dir: Path) -> list[int]:
    """Return the steps of a run's checkpoints, in ascending order."""
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(step for step in map(_step_of, names) if step is not None)


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def _pointed_at(run_dir: Path) -> int | None:
    try:
        return _step_of(read_again((run_dir / "checkpoints" / POINTER).read_bytes).decode().strip())
    except (OSError, UnicodeDecodeError):
        return None


def _step_of(name: str) -> int | None:
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def read_data_record(run_dir: Path) -> DataRecord:
    """Read the record of the data that the run was trained on.

    Raises:
        CheckpointError: the record is missing or damaged.
    """
    path = run_dir / "data.json"
    try:
        return DataRecord.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the record of the training data cannot be read: {error}",
            remedy="Copy the complete run folder again",
            location=path,
        ) from error
