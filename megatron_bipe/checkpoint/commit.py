"""Atomic publication of checkpoints, and deletion of old ones.

Folders have these names while the checkpoints of a run change:

    RUN/checkpoints/writing-step-00000100-TOKEN/   a checkpoint that is being written
    RUN/checkpoints/replaced-step-00000100/        an earlier checkpoint of the same step, which is being replaced
    RUN/checkpoints/removing-step-00000100/        a checkpoint that is being deleted

If the process dies at any point, the previous checkpoint and pointer remain valid; `tidy` removes leftovers.
"""

import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from megatron_bipe.checkpoint.find import POINTER, list_steps, step_folder
from megatron_bipe.checkpoint.manifest import CHECKSUM_NAME, INDEX, unusable_checkpoint
from megatron_bipe.config import CheckpointConfig
from megatron_bipe.data.manifest import FileRecord
from megatron_bipe.errors import CheckpointError
from megatron_bipe.io import PARTIAL_SUFFIX, fsync_path, write_atomically

FREE_SPACE = "Free space there, or keep fewer checkpoints with checkpoint.keep_last"

_GIB = 2**30
_WRITING, _REPLACED, _REMOVING = "writing-", "replaced-", "removing-"
_LEFTOVER = re.compile(rf"({_WRITING}|{_REPLACED}|{_REMOVING})step-\d{{8,}}(-\w+)?")
_OWN_FILE = re.compile(rf"(rank-\d{{5,}}\.safetensors|{INDEX}|{CHECKSUM_NAME})({PARTIAL_SUFFIX})?")


def begin(run_dir: Path, step: int, token: str, room_bytes: int) -> Path:
    """Create the temporary folder in which a checkpoint is written.

    Args:
        run_dir: folder of the run.
        step: updates done.
        token: distinguishes attempts, so that a process of an earlier attempt cannot write into this folder.
        room_bytes: free space that the disk must have.

    Raises:
        CheckpointError: the disk has less free space.
    """
    tidy(run_dir)
    final = step_folder(run_dir, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(final.parent).free
    if free_bytes < room_bytes:
        raise CheckpointError(
            f"{free_bytes / _GIB:.2f} GiB of the disk are free; a checkpoint and the reserve "
            f"checkpoint.min_free_gib need {room_bytes / _GIB:.2f} GiB",
            remedy=FREE_SPACE,
            location=final.parent,
        )
    temporary = final.with_name(f"{_WRITING}{final.name}-{token}")
    temporary.mkdir()
    return temporary


def publish(temporary: Path, run_dir: Path, step: int, files: Mapping[str, FileRecord]) -> Path:
    """Make a written folder the run's newest checkpoint.

    Args:
        temporary: folder from `begin`, with all its files synced to the disk.
        run_dir: folder of the run.
        step: updates done.
        files: records of its files.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: the size of a file differs from its record.
    """
    for name, record in files.items():
        size = (temporary / name).stat().st_size
        if size != record.bytes:
            raise unusable_checkpoint(temporary, f"{name} has {size} bytes; {record.bytes} were written")
    fsync_path(temporary)
    final = step_folder(run_dir, step)
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():  # after a rollback, the run reached this step again
        final.rename(replaced)
    temporary.rename(final)
    fsync_path(final.parent)
    write_atomically(final.with_name(POINTER), f"{final.name}\n".encode())
    return final


def retire(run_dir: Path, newest: int, config: CheckpointConfig, in_use: Collection[int] = ()) -> None:
    """Delete superseded checkpoints, except those of steps in use; call this after publishing the newest one."""
    tidy(run_dir)
    for step in superseded(list_steps(run_dir), newest, config):
        if step not in in_use:
            _remove(step_folder(run_dir, step))


def superseded(steps: list[int], newest: int, config: CheckpointConfig) -> list[int]:
    """Return the steps whose checkpoints are not to be kept.

    Steps after `newest` are never returned: they remain from before the run rolled back, or were rejected as damaged.
    """
    if config.keep_last == 0:
        return []
    own = sorted(step for step in steps if step <= newest)
    every = config.keep_every
    return [step for step in own[: -config.keep_last] if not (every and step % every == 0)]


def tidy(run_dir: Path) -> None:
    """Remove leftovers of interrupted saves, and restore a checkpoint whose replacement was interrupted.

    No other process may write to the run at the same time.
    """
    folder = run_dir / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        if not _LEFTOVER.fullmatch(path.name) or not path.is_dir() or path.is_symlink():
            continue
        if path.name.startswith((_WRITING, _REMOVING)):
            delete(path)
        else:
            final = path.with_name(path.name.removeprefix(_REPLACED))
            if final.exists():
                _remove(path)
            else:  # the process died between the two renames
                path.rename(final)


def delete(folder: Path) -> None:
    """Delete the files of a checkpoint, and its folder unless it holds others, which are not of the run."""
    for path in folder.iterdir():
        if _OWN_FILE.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _remove(folder: Path) -> None:
    """Rename a folder, so that it is no longer a checkpoint, and delete it."""
    removing = folder.with_name(f"{_REMOVING}{folder.name.removeprefix(_REPLACED)}")
    if folder.exists():
        folder.rename(removing)
        delete(removing)
