"""Checks of a run before its engine starts, for `--dry-run`, and warnings about a run that can start."""

import os
import shutil
from collections.abc import Callable, Collection, Iterator

from megatron_bipe.checkpoint.commit import FREE_SPACE
from megatron_bipe.checkpoint.disk_space import plan_disk
from megatron_bipe.checkpoint.find import find_model, find_trunk, list_steps
from megatron_bipe.checkpoint.manifest import load_config
from megatron_bipe.config import RunConfig, load_run_config
from megatron_bipe.data.dataset import open_tokenizer
from megatron_bipe.errors import BipeError, ConfigError
from megatron_bipe.model import count_parameters
from megatron_bipe.parallel import Mesh
from megatron_bipe.train.batch_loader import BatchLoader
from megatron_bipe.train.run_changes import check_branch, check_same_run
from megatron_bipe.train.validation import raise_together


def check_start(run: RunConfig, mesh: Mesh, allow: Collection[str] = ()) -> None:
    """Check data, tokenizer and folder of a run as its start does, except that no lock is taken.

    Args:
        run: the run configuration, validated, its precision resolved.
        mesh: first rank of the planned launch.
        allow: as in `check_same_run` and `check_branch`.

    Raises:
        BipeError: the only problem.
        ConfigError: lists all problems, if there are several.
    """
    raise_together(list(_problems(run, mesh, allow)), "the run cannot start", "--dry-run")


def start_warnings(run: RunConfig) -> list[str]:
    """Return warnings about a run that may start or resume; its folder has the configuration of its last start."""
    found = plan_disk(run, sum(count_parameters(run.model))).warnings()
    end = run.decay_end
    if end is not None and run.train.steps > end and run.optimizer.min_lr == 0:
        found.append(
            f"the learning rate is 0 from step {end} on, where its decay ends: the last {run.train.steps - end} steps "
            "will change nothing. Set optimizer.min_lr, or a later optimizer.decay_steps"
        )
    continued = _continued(run)
    if continued is not None:
        before, now = _validation(continued), _validation(run)
        found += [
            f"{key} was {before[key]} and is now {value}: validation losses before and after this start may be of "
            "different samples or lengths"
            for key, value in now.items()
            if before["data.valid"] and before[key] != value
        ]
    return found


def _continued(run: RunConfig) -> RunConfig | None:
    """Return the configuration of the last start of a run, or of the checkpoint that a new branch begins with."""
    if list_steps(run.run_dir):
        return load_run_config(run.run_dir / "config.yaml")
    return load_config(find_trunk(run.train.branch_from).folder) if run.train.branch_from else None


def _validation(run: RunConfig) -> dict[str, object]:
    """Return what decides which validations a run has; it may change on resumption, but curves break there."""
    sets = {name: str(folder) for name, folder in run.data.valid_sets.items()}
    lengths = list(run.valid_lengths)
    return {"data.valid": sets, "train.valid_samples": run.train.valid_samples, "train.valid_lengths": lengths}


def _problems(run: RunConfig, mesh: Mesh, allow: Collection[str]) -> Iterator[BipeError]:
    loader = None
    try:
        loader = BatchLoader(run, mesh)
    except BipeError as error:
        yield error
    checks: list[Callable[[], object]] = [
        lambda: open_tokenizer(loader.dataset) if loader else None,
        lambda: check_branch(run, loader.record if loader else None, allow),
        lambda: check_same_run(run, loader.record if loader else None, allow),
        lambda: _check_writable(run),
        lambda: find_model(run.train.init_from) if run.train.init_from and not list_steps(run.run_dir) else None,
    ]
    for check in checks:
        try:
            check()
        except BipeError as error:
            yield error


def _check_writable(run: RunConfig) -> None:
    existing = run.run_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        seen = "may not be written to" if existing.is_dir() else "is not a folder"
        raise ConfigError(
            f"{existing} {seen}, so that the run folder cannot be written",
            remedy="Choose another one with --set run_dir=OTHER",
            location=run.run_dir,
        )
    if shutil.disk_usage(existing).free == 0:
        raise ConfigError(f"the disk of {existing} is full", remedy=FREE_SPACE, location=run.run_dir)
