"""How a checkpoint appears whole or not at all, and how old ones leave.

RUN/checkpoints/writing-step-00000100-TOKEN/   being written
RUN/checkpoints/replaced-step-00000100/        an earlier one of the same step, while the new one takes its place
RUN/checkpoints/removing-step-00000100/        being deleted

A death at any moment leaves the previous checkpoint and pointer as they were; `tidy` clears away what else it left.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_bipe.checkpoint.find import POINTER, list_steps, step_folder
from megatron_bipe.checkpoint.manifest import incomplete
from megatron_bipe.config.schema import CheckpointConfig
from megatron_bipe.data.manifest import FileRecord
from megatron_bipe.errors import CheckpointError
from megatron_bipe.io import sync, write_atomically

FREE_SPACE = "Free space there, or keep fewer checkpoints: checkpoint.keep_last"

_GIB = 2**30
_WRITING, _REPLACED, _REMOVING = "writing-", "replaced-", "removing-"


def begin(run_dir: Path, step: int, token: str, room_bytes: int) -> Path:
    """Make the folder that a checkpoint is written in.

    Args:
        run_dir: of the run.
        step: updates done.
        token: tells attempts apart, so that a process of an earlier one cannot write into this.
        room_bytes: that the disk must have.

    Raises:
        CheckpointError: it does not have them.
    """
    tidy(run_dir)
    final = step_folder(run_dir, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(final.parent).free
    if free_bytes < room_bytes:
        raise CheckpointError(
            f"{free_bytes / _GIB:.2f} GiB of the disk are free, and a checkpoint with what is to stay free beside it "
            f"(checkpoint.min_free_gib) takes {room_bytes / _GIB:.2f}",
            remedy=FREE_SPACE,
            location=final.parent,
        )
    temporary = final.with_name(f"{_WRITING}{final.name}-{token}")
    temporary.mkdir()
    return temporary


def publish(temporary: Path, run_dir: Path, step: int, files: Mapping[str, FileRecord]) -> Path:
    """Make a written folder the run's newest checkpoint.

    Args:
        temporary: from `begin`; everything in it is on the disk.
        run_dir: of the run.
        step: updates done.
        files: what is in it.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: a file has another size than it was written with.
    """
    for name, record in files.items():
        size = (temporary / name).stat().st_size
        if size != record.bytes:
            raise incomplete(temporary, f"{name} has {size} bytes where {record.bytes} were written")
    sync(temporary)
    final = step_folder(run_dir, step)
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():  # the run went back and came here again
        final.rename(replaced)
    temporary.rename(final)
    sync(final.parent)
    write_atomically(final.with_name(POINTER), f"{final.name}\n".encode())
    return final


def retire(run_dir: Path, newest: int, config: CheckpointConfig) -> None:
    """Delete what is not to be kept, once the newest checkpoint is published."""
    tidy(run_dir)
    for step in superseded(list_steps(run_dir), newest, config):
        _remove(step_folder(run_dir, step))


def superseded(steps: list[int], newest: int, config: CheckpointConfig) -> list[int]:
    """Which of the steps are not to be kept.

    Later ones than the newest are no part of this: a run that went back left them, perhaps because they are damaged.
    """
    if config.keep_last == 0:
        return []
    own = sorted(step for step in steps if step <= newest)
    every = config.keep_every
    return [step for step in own[: -config.keep_last] if not (every and step % every == 0)]


def tidy(run_dir: Path) -> None:
    """Clear away what broken-off saves left; nothing of it is a checkpoint, or all of it.

    For one process of a run that no other process writes to.
    """
    folder = run_dir / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith((_WRITING, _REMOVING)):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(_REPLACED):
            final = path.with_name(path.name.removeprefix(_REPLACED))
            if final.exists():
                _remove(path)
            else:  # the death came between the two renames
                path.rename(final)


def _remove(folder: Path) -> None:
    """Delete a checkpoint, which stops being one at once."""
    doomed = folder.with_name(f"{_REMOVING}{folder.name}")
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
