"""Checkpoints of a run folder: where they lie, how one appears whole or not at all.

RUN/checkpoints/step-00000100/   what the engine wrote after 100 updates
RUN/checkpoints/latest           name of the newest one
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from megatron_bipe.disk import sync
from megatron_bipe.errors import CheckpointError

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
        wanted = _pointed_at(run_dir)
        if wanted not in found:  # a crash may have come between the checkpoint and the pointer to it
            wanted = list(found)[-1]
    if wanted not in found:
        listed = ", ".join(found) or "none"
        raise CheckpointError(
            f"no checkpoint {'of step ' + wanted if wanted else 'to be found'}; steps there are: {listed}",
            remedy="Name a run folder made by pretrain.py, or RUN_DIR@STEP",
            place=spec,
        )
    return Checkpoint(step_folder(run_dir, found[wanted]), run_dir, found[wanted])


def is_run_dir(path: Path) -> bool:
    """True where pretrain.py has worked: a resolved configuration and a folder of checkpoints."""
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def list_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints of a run, ascending."""
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(step) for step in map(_step_of, names) if step is not None)


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def publish(
    run_dir: Path,
    step: int,
    write: Callable[[Path], None],
    finish: Callable[[Path], None],
    is_main: bool,
    barrier: Callable[[], None],
) -> Path:
    """Make a folder the newest checkpoint once all of it is on the disk.

    A crash at any moment leaves the previous checkpoint and pointer as they were.

    Args:
        run_dir: of the run.
        step: updates done.
        write: called on every rank with a temporary folder; what it writes is on the disk when it returns.
        finish: the same, called on the main rank after all have written.
        is_main: whether this is that rank.
        barrier: waits for all ranks.

    Returns:
        The folder of the checkpoint.
    """
    final = step_folder(run_dir, step)
    temporary = final.with_name(f"writing-{final.name}")
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)  # an attempt that was broken off, perhaps by more ranks
        temporary.mkdir(parents=True)
    barrier()
    write(temporary)
    barrier()
    if is_main:
        finish(temporary)
        sync(temporary)
        if final.exists():  # the same step again, after a resume: same content
            shutil.rmtree(final)
        temporary.rename(final)
        pointer = final.with_name("latest")
        fresh = final.with_name("latest.writing")
        fresh.write_text(final.name + "\n")
        sync(fresh)
        fresh.rename(pointer)
        sync(final.parent)
    barrier()
    return final


def _pointed_at(run_dir: Path) -> str:
    pointer = run_dir / "checkpoints" / "latest"
    return (_step_of(pointer.read_text().strip()) if pointer.is_file() else None) or ""


def _step_of(name: str) -> str | None:
    match = _STEP.fullmatch(name)
    return str(int(match[1])) if match else None
