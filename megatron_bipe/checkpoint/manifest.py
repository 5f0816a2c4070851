"""The manifest of a checkpoint: the contents of its files, their checksums, and the run that it belongs to.

    state.json          the index
    state.json.sha256   its checksum, in the format of `sha256sum`

docs/checkpoints.md describes the fields.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from megatron_bipe.config import RunConfig
from megatron_bipe.data.manifest import DataRecord, FileRecord, InnerName
from megatron_bipe.errors import CheckpointError, is_transient
from megatron_bipe.io import read_again, write_atomically
from megatron_bipe.model import Shard

FORMAT_VERSION = 2
INDEX, CHECKSUM_NAME = "state.json", "state.json.sha256"


class CheckpointInfo(NamedTuple):
    """Metadata of the run that a checkpoint stores besides its state."""

    step: int  # updates of the run
    optimizer_steps: int  # updates that Adam has counted
    layout: dict[str, int]  # layout of the ranks that wrote it; informational
    config: dict[str, Any]  # the resolved configuration
    data: DataRecord | None  # record of the training data, None if unknown
    loop_state: dict[str, Any]  # state of the training loop, see train/train_state.py


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SavedRun(_Strict):
    """Location of a fragment."""

    file: InnerName
    tensor_rank: int  # index of its shard; 0 if the parameter is unsharded
    start: int
    size: int


class SavedParameter(_Strict):
    """A parameter as the writing ranks held it."""

    shape: tuple[int, ...]  # shape of the parameter, or of a shard
    dim: int | None = None  # dimension along which it is sharded; None: unsharded
    blocks: int = 1  # number of blocks that are sharded separately
    ranks: int = 1  # number of shards
    runs: tuple[SavedRun, ...]

    def shard(self, rank: int = 0) -> Shard | None:
        """Return the sharding as the model describes it, or None if unsharded."""
        return None if self.dim is None else Shard(self.dim, self.blocks, rank, self.ranks)


class CheckpointManifest(_Strict):
    """Contents of `state.json`; see `CheckpointInfo`."""

    format_version: int
    step: int
    optimizer_steps: int
    layout: dict[str, int]
    config: dict[str, Any]
    data: DataRecord | None
    loop_state: dict[str, Any]
    files: dict[InnerName, FileRecord]  # all other files of the folder
    parameters: dict[str, SavedParameter]  # in the order of the plan

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        named = {run.file for parameter in self.parameters.values() for run in parameter.runs}
        if unlisted := sorted(named - self.files.keys()):
            raise ValueError(f"parameters are in files without a checksum: {', '.join(unlisted)}")
        return self


def save_index(folder: Path, index: CheckpointManifest) -> None:
    """Write the index and its checksum, synced to the disk."""
    text = index.model_dump_json(indent=1).encode()
    write_atomically(folder / INDEX, text)
    write_atomically(folder / CHECKSUM_NAME, _checksum_line(text))


def load_index(folder: Path) -> CheckpointManifest:
    """Read the index; the other files are not verified.

    Raises:
        CheckpointError: it is missing, was changed after it was written, or is of another version.
    """
    try:
        text, checksum = (read_again((folder / name).read_bytes) for name in (INDEX, CHECKSUM_NAME))
    except FileNotFoundError as error:
        raise unusable_checkpoint(
            folder, f"{Path(error.filename).name} is missing, which every checkpoint has"
        ) from None
    except OSError as error:
        raise unreadable_checkpoint(folder, INDEX, error) from error
    if checksum != _checksum_line(text):
        raise unusable_checkpoint(
            folder, f"{INDEX} does not match {CHECKSUM_NAME}: one was changed after it was written"
        )
    try:
        index = CheckpointManifest.model_validate_json(text)
    except ValidationError as error:
        raise unusable_checkpoint(folder, f"{INDEX} cannot be read: {error}") from error
    if index.format_version != FORMAT_VERSION:
        raise unusable_checkpoint(
            folder, f"it has format version {index.format_version}; this code reads {FORMAT_VERSION}"
        )
    return index


def load_config(folder: Path) -> RunConfig:
    """Read the configuration with which a checkpoint was written; that of its run may have changed since.

    Raises:
        CheckpointError: as in `load_index`, or the configuration cannot be read.
    """
    try:
        return RunConfig.model_validate(load_index(folder).config)
    except ValidationError as error:
        raise unusable_checkpoint(folder, f"its configuration cannot be read: {error}") from error


def fingerprint_of(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's index, which has those of all files, as recorded; "" if it cannot be read.

    Two checkpoints of one step differ in it if they differ in anything.
    """
    try:
        recorded = read_again((folder / CHECKSUM_NAME).read_bytes).decode()
    except (OSError, UnicodeDecodeError):
        return ""
    return recorded.partition(" ")[0]


def unusable_checkpoint(folder: Path, seen: str) -> CheckpointError:
    """Return the error for a checkpoint that cannot be used, with the reason `seen`."""
    return CheckpointError(
        f"the checkpoint cannot be used: {seen}",
        remedy="Continue from another step of the run: RUN_DIR@STEP names one",
        location=folder,
    )


def unreadable_checkpoint(folder: Path, name: str, error: OSError) -> CheckpointError:
    """Return the error for a file of a checkpoint that cannot be read, which does not prove that it is damaged."""
    found = unusable_checkpoint(folder, f"{name} cannot be read: {error.strerror or error}")
    found.transient = is_transient(error)
    return found


def _checksum_line(text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()}  {INDEX}\n".encode()
