"""The manifest of a checkpoint: what its files hold, their checksums, and what run they are of.

    state.json          the index
    state.json.sha256   its own checksum, as `sha256sum` writes it

docs/checkpoints.md describes the fields.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_bipe.data.manifest import DataRecord, FileRecord
from megatron_bipe.errors import CheckpointError
from megatron_bipe.io import write_atomically
from megatron_bipe.model.layer_factory import Shard

FORMAT_VERSION = 2
INDEX, SEAL = "state.json", "state.json.sha256"


class CheckpointInfo(NamedTuple):
    """What a checkpoint says of the run, besides its state."""

    step: int  # updates of the run
    optimizer_steps: int  # updates that Adam has counted
    layout: dict[str, int]  # of the ranks that wrote it; for people
    config: dict[str, Any]  # the resolved configuration
    data: DataRecord | None  # the training data, None where nothing is known of it
    loop_state: dict[str, Any]  # what the loop wants back, see train/train_state.py


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SavedRun(_Strict):
    """Where a fragment lies."""

    file: str
    tensor_rank: int  # of its share; 0 where the parameter is whole
    start: int
    size: int


class SavedParameter(_Strict):
    """A parameter as the ranks held it that wrote it."""

    shape: tuple[int, ...]  # whole, or of a share
    dim: int | None = None  # along which it is split; None: it is whole
    blocks: int = 1  # each of which is split by itself
    ranks: int = 1  # shares
    runs: tuple[SavedRun, ...]

    def shard(self, rank: int = 0) -> Shard | None:
        """As the model knows it."""
        return None if self.dim is None else Shard(self.dim, self.blocks, rank, self.ranks)


class CheckpointManifest(_Strict):
    """What `state.json` says; see `About`."""

    format_version: int
    step: int
    optimizer_steps: int
    layout: dict[str, int]
    config: dict[str, Any]
    data: DataRecord | None
    loop_state: dict[str, Any]
    files: dict[str, FileRecord]  # all others of the folder
    parameters: dict[str, SavedParameter]  # in the order of the plan


def save_index(folder: Path, index: CheckpointManifest) -> None:
    """Write the index and its checksum; on the disk when this returns."""
    text = index.model_dump_json(indent=1).encode()
    write_atomically(folder / INDEX, text)
    write_atomically(folder / SEAL, _seal(text))


def load_index(folder: Path) -> CheckpointManifest:
    """Read the index; the other files are not looked at.

    Raises:
        CheckpointError: it is missing, not as it was written, or of another version.
    """
    try:
        text, seal = (folder / INDEX).read_bytes(), (folder / SEAL).read_bytes()
    except FileNotFoundError as error:
        raise incomplete(folder, f"there is no {Path(error.filename).name}, which every checkpoint has") from None
    except OSError as error:
        raise incomplete(folder, f"{INDEX} cannot be read: {error}") from error
    if seal != _seal(text):
        raise incomplete(folder, f"{INDEX} and {SEAL} do not belong together: one was changed after it was written")
    try:
        index = CheckpointManifest.model_validate_json(text)
    except ValidationError as error:
        raise incomplete(folder, f"{INDEX} cannot be read: {error}") from error
    if index.format_version != FORMAT_VERSION:
        raise incomplete(folder, f"format version {index.format_version}; this code reads {FORMAT_VERSION}")
    return index


def incomplete(folder: Path, seen: str) -> CheckpointError:
    """The one error for a checkpoint that is damaged, with what was seen."""
    return CheckpointError(
        f"the checkpoint is not whole: {seen}",
        remedy="Continue from another step of the run: RUN_DIR@STEP names one",
        location=folder,
    )


def _seal(text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()}  {INDEX}\n".encode()
