"""Verification that a checkpoint is undamaged and belongs to this run, by all ranks before it is loaded."""

import logging
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from megatron_bipe.checkpoint.find import Checkpoint, newest_first
from megatron_bipe.checkpoint.manifest import INDEX, CheckpointManifest, load_index, unusable_checkpoint
from megatron_bipe.checkpoint.shard_files import WEIGHT, StateReader
from megatron_bipe.config import RunConfig, load_run_config
from megatron_bipe.data.dataset import describe_special_in_text
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.errors import CheckpointError
from megatron_bipe.io import sha256_of
from megatron_bipe.parallel import Mesh
from megatron_bipe.runtime.hardware import DTYPES
from megatron_bipe.runtime.host_collectives import HostCollectives

_log = logging.getLogger(__name__)


def latest_valid_checkpoint(
    run_dir: Path, foreign: Callable[[CheckpointManifest], str], mesh: Mesh, host: HostCollectives
) -> Checkpoint | None:
    """Return a run's newest valid checkpoint, or None if it has no checkpoints. Every rank calls this.

    Each rank verifies some of the files: its own, if the layout is the one that wrote them.

    Args:
        run_dir: folder of the run.
        foreign: returns why an index belongs to another run, or "".
        mesh: this process among the ranks.
        host: host-side collectives over all ranks.

    Raises:
        CheckpointError: on all ranks, if there are checkpoints but none is valid; states the problem of each.
    """
    candidates = host.broadcast_object(newest_first(run_dir))
    rejected: list[str] = []
    for checkpoint in candidates:
        found = host.all_gather_object(_problem(checkpoint, foreign, mesh.rank, mesh.num_ranks))
        problems = list(dict.fromkeys(problem for problem in found if problem))
        if not problems:
            if rejected and mesh.is_main:
                _log.warning("falling back to the checkpoint of step %d: %s", checkpoint.step, "; ".join(rejected))
            return checkpoint
        rejected.append(f"that of step {checkpoint.step}: {'; '.join(problems)}")
    if rejected:
        raise CheckpointError(
            f"no checkpoint of the run can be resumed: {'; '.join(rejected)}",
            remedy="Restore one of them from a backup, or start a new run with --set run_dir=OTHER",
            location=run_dir,
        )
    return None


def check_complete(checkpoint: Checkpoint, part: int = 0, parts: int = 1) -> CheckpointManifest:
    """Verify every byte of a checkpoint, or of the `part`-th of `parts` subsets of its files, and return its index.

    Raises:
        CheckpointError: a file is missing or was changed after it was written.
    """
    folder = checkpoint.folder
    index = load_index(folder)
    if index.step != checkpoint.step:
        raise unusable_checkpoint(folder, f"its {INDEX} is of step {index.step}")
    for name in sorted(index.files)[part::parts]:
        record = index.files[name]
        try:
            size = (folder / name).stat().st_size
            if size != record.bytes:
                raise unusable_checkpoint(folder, f"{name} has {size} bytes; {INDEX} says {record.bytes}")
            found = sha256_of(folder / name)
        except OSError as error:
            raise unusable_checkpoint(folder, f"{name} cannot be read: {error.strerror or error}") from error
        if found != record.sha256:
            raise unusable_checkpoint(folder, f"the SHA-256 of {name} is {found}; {INDEX} says {record.sha256}")
    return index


def belongs_to_another_run(index: CheckpointManifest, run: RunConfig, data: DataRecord | None) -> str:
    """Return why a checkpoint cannot belong to this run, even after every permitted change of settings, or ""."""
    try:
        saved = RunConfig.model_validate(index.config)
    except ValidationError as error:
        return f"its configuration cannot be read: {error}"
    if saved.model != run.model:
        return "it is of another model"
    if saved.train.seed != run.train.seed:
        return f"it is of a run with train.seed={saved.train.seed}"
    if data is not None and index.data is not None:
        if index.data.tokenizer.fingerprint != data.tokenizer.fingerprint:
            return "it is of a run with another tokenizer"
        made = (index.data.special_in_text, data.special_in_text)
        if None not in made and made[0] != made[1]:
            return f"it is of a run on data made {describe_special_in_text(made[0])}"
        if index.data.rule != data.rule:
            return f"it is of a run with the segment rule {index.data.rule.spec}"
    return ""


def _problem(checkpoint: Checkpoint, foreign: Callable[[CheckpointManifest], str], part: int, parts: int) -> str:
    """Return the problem with a subset of the files or with the index, or ""."""
    try:
        return foreign(check_complete(checkpoint, part, parts))
    except CheckpointError as error:
        return error.message


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return all weights by the plan's names, in the run's compute precision, on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    check_complete(checkpoint)
    dtype = DTYPES[load_run_config(checkpoint.run_dir / "config.yaml").train.precision]
    reader = StateReader(checkpoint.folder)
    return {name: reader.full(WEIGHT, name).to(dtype) for name in reader.index.parameters}
