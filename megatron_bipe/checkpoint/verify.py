"""Is a checkpoint as it was written, and of this run: looked at by all ranks before one of them reads it."""

import logging
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from megatron_bipe.checkpoint.find import Checkpoint, newest_first
from megatron_bipe.checkpoint.manifest import INDEX, CheckpointManifest, incomplete, load_index
from megatron_bipe.config.schema import RunConfig
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.errors import CheckpointError
from megatron_bipe.io import sha256
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.host_collectives import HostCollectives

_log = logging.getLogger(__name__)


def latest_valid_checkpoint(
    run_dir: Path, foreign: Callable[[CheckpointManifest], str], mesh: Mesh, host: HostCollectives
) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole; None if there is none at all. Every rank calls this.

    Each rank reads a part of the files, its own one where the layout is the one that wrote them.

    Args:
        run_dir: of the run.
        foreign: says what of an index is of another run; "" if nothing.
        mesh: this process among the ranks.
        host: of the ranks.

    Raises:
        CheckpointError: on all ranks, if none is; says what is wrong with each.
    """
    candidates = host.broadcast_object(newest_first(run_dir))
    wrong: list[str] = []
    for checkpoint in candidates:
        found = host.all_gather_object(_problem(checkpoint, foreign, mesh.rank, mesh.num_ranks))
        problems = list(dict.fromkeys(problem for problem in found if problem))
        if not problems:
            if wrong and mesh.is_main:
                _log.warning("falling back to the checkpoint of step %d: %s", checkpoint.step, "; ".join(wrong))
            return checkpoint
        wrong.append(f"that of step {checkpoint.step}: {'; '.join(problems)}")
    if wrong:
        raise CheckpointError(
            f"no checkpoint of the run can be continued from: {'; '.join(wrong)}",
            remedy="Copy one of them again from where it was backed up, or start anew with --set run_dir=OTHER",
            location=run_dir,
        )
    return None


def check_complete(checkpoint: Checkpoint, part: int = 0, parts: int = 1) -> CheckpointManifest:
    """Read every byte of a checkpoint, or of the `part`-th of `parts` shares of its files; its index.

    Raises:
        CheckpointError: a file is missing or not as it was written.
    """
    folder = checkpoint.folder
    index = load_index(folder)
    if index.step != checkpoint.step:
        raise incomplete(folder, f"{INDEX} is that of step {index.step}")
    for name in sorted(index.files)[part::parts]:
        record = index.files[name]
        try:
            size = (folder / name).stat().st_size
            if size != record.bytes:
                raise incomplete(folder, f"{name} has {size} bytes; {INDEX} says {record.bytes}")
            found = sha256(folder / name)
        except OSError as error:
            raise incomplete(folder, f"{name} cannot be read: {error.strerror or error}") from error
        if found != record.sha256:
            raise incomplete(folder, f"the SHA-256 of {name} is {found}; {INDEX} says {record.sha256}")
    return index


def belongs_to_another_run(index: CheckpointManifest, run: RunConfig, data: DataRecord | None) -> str:
    """What in a checkpoint cannot be of this run, whatever was changed in it between two starts; "" if nothing."""
    try:
        its = RunConfig.model_validate(index.config)
    except ValidationError as error:
        return f"its configuration cannot be read: {error}"
    if its.model != run.model:
        return "it is of another model"
    if its.train.seed != run.train.seed:
        return f"it is of a run with train.seed={its.train.seed}"
    if data is not None and index.data is not None:
        if index.data.tokenizer.fingerprint != data.tokenizer.fingerprint:
            return "it is of a run with another tokenizer"
        if index.data.rule != data.rule:
            return f"it is of a run with the segment rule {index.data.rule.spec}"
    return ""


def _problem(checkpoint: Checkpoint, foreign: Callable[[CheckpointManifest], str], part: int, parts: int) -> str:
    """What is wrong with a share of the files, or with the index; "" if nothing is."""
    try:
        return foreign(check_complete(checkpoint, part, parts))
    except CheckpointError as error:
        return error.message
