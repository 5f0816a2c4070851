"""Verification that a checkpoint is undamaged and belongs to its run, before any of its weights are used."""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_bipe.checkpoint.find import Checkpoint, newest_first, read_data_record, step_folder
from megatron_bipe.checkpoint.manifest import (
    INDEX,
    CheckpointManifest,
    load_index,
    unreadable_checkpoint,
    unusable_checkpoint,
)
from megatron_bipe.checkpoint.shard_files import WEIGHT, StateReader
from megatron_bipe.config import RunConfig, load_run_config
from megatron_bipe.data.dataset import describe_special_in_text, special_in_text_differs
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.errors import CheckpointError
from megatron_bipe.io import finish, hashing
from megatron_bipe.parallel import Mesh
from megatron_bipe.runtime.hardware import weights_dtype
from megatron_bipe.runtime.host_collectives import HostCollectives
from megatron_bipe.runtime.observer import Observer

_log = logging.getLogger(__name__)


def latest_valid_checkpoint(
    run_dir: Path,
    foreign: Callable[[CheckpointManifest], str],
    mesh: Mesh,
    host: HostCollectives,
    observer: Observer | None = None,
) -> Checkpoint | None:
    """Return a run's newest valid checkpoint, or None if it has no checkpoints. Every rank calls this.

    Each rank verifies some of the files: its own, if the layout is the one that wrote them.

    Args:
        run_dir: folder of the run.
        foreign: returns why an index belongs to another run, or "".
        mesh: this process among the ranks.
        host: host-side collectives over all ranks.
        observer: learns of the progress, and of a checkpoint that is skipped.

    Raises:
        CheckpointError: on all ranks, if there are checkpoints but none is valid; states the problem of each. It is
            transient if one of them could not be read.
    """
    observer = observer or Observer()
    steps = host.broadcast_object([checkpoint.step for checkpoint in newest_first(run_dir)])
    candidates = [Checkpoint(step_folder(run_dir, step), run_dir, step) for step in steps]
    rejected: dict[int, str] = {}
    is_unreadable = False
    for checkpoint in candidates:
        problem, is_transient = _judge_together(checkpoint, foreign, mesh, host, observer)
        if not problem:
            if rejected and mesh.is_main:
                _log.warning("falling back to the checkpoint of step %d: %s", checkpoint.step, _listed(rejected))
                observer.fell_back(checkpoint.step, rejected)
            return checkpoint
        rejected[checkpoint.step] = problem
        is_unreadable = is_unreadable or is_transient
    if rejected:
        raise CheckpointError(
            f"no checkpoint of the run can be resumed: {_listed(rejected)}",
            remedy="Restore one of them from a backup, or start a new run with --set run_dir=OTHER",
            location=run_dir,
            transient=is_unreadable,
        )
    return None


def check_trunk(
    trunk: Checkpoint,
    foreign: Callable[[CheckpointManifest], str],
    mesh: Mesh,
    host: HostCollectives,
    observer: Observer,
) -> None:
    """Verify every byte of the checkpoint that a run branches from; every rank calls this.

    The parameters are those of `latest_valid_checkpoint`.

    Raises:
        CheckpointError: on all ranks, if it is damaged or does not fit the run.
    """
    problem, is_transient = _judge_together(trunk, foreign, mesh, host, observer)
    if problem:
        raise CheckpointError(
            f"the run cannot branch from step {trunk.step}: {problem}",
            remedy="Restore this checkpoint from a backup, or name another one with train.branch_from=RUN_DIR@STEP",
            location=trunk.folder,
            transient=is_transient,
        )


def _judge_together(
    checkpoint: Checkpoint,
    foreign: Callable[[CheckpointManifest], str],
    mesh: Mesh,
    host: HostCollectives,
    observer: Observer,
) -> tuple[str, bool]:
    """Return the problems that all ranks have found with a checkpoint ("": none), and True if one may be transient."""
    own = _Verdict()
    for _ in host.in_rounds(_judge(checkpoint, foreign, mesh, own)):
        observer.progress()
    verdicts = host.all_gather_object([own.problem, own.is_transient])
    problems = dict.fromkeys(problem for problem, _ in verdicts if problem)
    return "; ".join(problems), any(is_transient for _, is_transient in verdicts)


def _listed(rejected: Mapping[int, str]) -> str:
    return "; ".join(f"that of step {step}: {problem}" for step, problem in rejected.items())


def check_complete(checkpoint: Checkpoint, part: int = 0, parts: int = 1) -> CheckpointManifest:
    """Verify every byte of a checkpoint, or of the `part`-th of `parts` subsets of its files, and return its index.

    Raises:
        CheckpointError: a file is missing or was changed after it was written.
    """
    return finish(_checking(checkpoint, part, parts))


def _checking(checkpoint: Checkpoint, part: int, parts: int) -> Generator[None, None, CheckpointManifest]:
    """Do the work of `check_complete`, and yield after each chunk of a file."""
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
            found = yield from hashing(folder / name)
        except OSError as error:
            raise unreadable_checkpoint(folder, name, error) from error
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
        if special_in_text_differs(index.data.special_in_text, data.special_in_text):
            return f"it is of a run on data made {describe_special_in_text(index.data.special_in_text)}"
        if index.data.rule != data.rule:
            return f"it is of a run with the segment rule {index.data.rule.spec}"
    return ""


@dataclass
class _Verdict:
    """What a rank has found about its files of a checkpoint, and about the index."""

    problem: str = ""  # empty if there is none
    is_transient: bool = False


def _judge(
    checkpoint: Checkpoint, foreign: Callable[[CheckpointManifest], str], mesh: Mesh, verdict: _Verdict
) -> Iterator[None]:
    """Check this rank's subset of the files in steps, and set the verdict."""
    try:
        index = yield from _checking(checkpoint, mesh.rank, mesh.num_ranks)
        verdict.problem = foreign(index)
    except CheckpointError as error:
        verdict.problem, verdict.is_transient = error.message, error.transient


def read_run(checkpoint: Checkpoint) -> tuple[RunConfig, DataRecord]:
    """Return the configuration and the data record of a checkpoint's run folder, which the checkpoint must confirm.

    Raises:
        CheckpointError: a file is missing or damaged, or describes another model, tokenizer or segment rule.
    """
    run = load_run_config(checkpoint.run_dir / "config.yaml")
    record = read_data_record(checkpoint.run_dir)
    if difference := belongs_to_another_run(load_index(checkpoint.folder), run, record):
        raise CheckpointError(
            f"config.yaml and data.json do not fit the checkpoint of step {checkpoint.step}: {difference}",
            remedy="Copy the complete run folder again, or undo the change of these files",
            location=checkpoint.run_dir,
        )
    return run, record


class CheckpointWeights(Mapping[str, Tensor]):
    """The weights of a checkpoint by the plan's names, on the CPU: read on access and not cached.

    All files of the checkpoint are verified before the first weight is read.

    Raises:
        CheckpointError: the index is damaged; on access, a file is missing or damaged.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self._names = tuple(load_index(checkpoint.folder).parameters)

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.full(WEIGHT, name).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def _reader(self) -> StateReader:
        check_complete(self._checkpoint)
        return StateReader(self._checkpoint.folder)


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return all weights by the plan's names, in the run's compute precision, on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    dtype = weights_dtype(load_run_config(checkpoint.run_dir / "config.yaml").train.precision)
    return dict(CheckpointWeights(checkpoint, dtype))
