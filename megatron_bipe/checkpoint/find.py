"""Checkpoints of a run folder: where they lie, and which is the newest.

RUN/checkpoints/step-00000100/   what the engine wrote after 100 updates
RUN/checkpoints/latest           name of the newest one
"""

import re
from pathlib import Path
from typing import NamedTuple

from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.errors import CheckpointError

POINTER = "latest"

_STEP = re.compile(r"step-(\d{8,})")


class Checkpoint(NamedTuple):
    """A checkpoint that exists."""

    folder: Path
    run_dir: Path
    step: int  # updates done


def find_checkpoint(spec: str | Path) -> Checkpoint:
    """The checkpoint that `RUN_DIR` (its newest) or `RUN_DIR@STEP` names.

    Raises:
        CheckpointError: there is no such run folder or checkpoint; the message lists the steps there are.
    """
    run_dir, wanted = Path(spec), ""
    if not run_dir.is_dir():  # a folder's own name may have an @
        name, at, step = str(spec).rpartition("@")
        run_dir, wanted = (Path(name), step) if at else (run_dir, "")
    found = {str(step): step for step in list_steps(run_dir)}
    if not wanted and found:
        return newest_first(run_dir)[0]
    if wanted not in found:
        listed = ", ".join(found) or "none"
        raise CheckpointError(
            f"no checkpoint {'of step ' + wanted if wanted else 'to be found'}; steps there are: {listed}",
            remedy="Name a run folder made by pretrain.py, or RUN_DIR@STEP",
            location=spec,
        )
    return Checkpoint(step_folder(run_dir, found[wanted]), run_dir, found[wanted])


def find_model(spec: str) -> Checkpoint | None:
    """Find the model that a folder's name, or `RUN_DIR[@STEP]`, stands for.

    Returns:
        The checkpoint that is named; None for an exported model.

    Raises:
        CheckpointError: there is neither.
    """
    if (Path(spec) / "config.json").is_file():
        return None
    run_dir = Path(spec if Path(spec).exists() else spec.rpartition("@")[0] or spec)
    if is_run_dir(run_dir):
        return find_checkpoint(spec)
    what = "neither an exported model (config.json) nor a run folder" if run_dir.exists() else "no such folder"
    raise CheckpointError(
        what,
        remedy="Name a folder made by tools/export_hf.py or tools/import_hf.py, or RUN_DIR[@STEP] of pretrain.py",
        location=spec,
    )


def newest_first(run_dir: Path) -> list[Checkpoint]:
    """All checkpoints of a run, in the order in which they are to be tried.

    The one that `latest` names, then those before it; later ones last, since a run that had gone back has left them.
    Where `latest` is missing or wrong, from the last on.
    """
    steps = list_steps(run_dir)
    pointed = _pointed_at(run_dir)
    newest = pointed if pointed in steps else max(steps, default=0)
    order = [step for step in reversed(steps) if step <= newest] + [step for step in reversed(steps) if step > newest]
    return [Checkpoint(step_folder(run_dir, step), run_dir, step) for step in order]


def is_run_dir(path: Path) -> bool:
    """True where pretrain.py has worked: a resolved configuration and a folder of checkpoints."""
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def list_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints of a run, ascending."""
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(step for step in map(_step_of, names) if step is not None)


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def _pointed_at(run_dir: Path) -> int | None:
    try:
        return _step_of((run_dir / "checkpoints" / POINTER).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return None


def _step_of(name: str) -> int | None:
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def read_data_record(run_dir: Path) -> DataRecord:
    """What the run was trained on.

    Raises:
        CheckpointError: the record is missing or damaged.
    """
    path = run_dir / "data.json"
    try:
        return DataRecord.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the record of the training data cannot be read: {error}",
            remedy="Copy the whole run folder again",
            location=path,
        ) from error
