"""The folder of a run: started once, continued ever after, never mixed with another run's.

RUN/config.yaml       the resolved configuration
RUN/data.json         tokenizer, segment rule and fingerprint of the training data
RUN/tokenizer/        the tokenizer's files, so that an export needs nothing else
RUN/metrics.jsonl     one line a step
RUN/events.jsonl      one line for each start, stop, bad step and the like
RUN/tensorboard/      the same for TensorBoard
RUN/checkpoints/      see checkpoint/find.py
RUN/running/          while a launch is at work: holds its lock
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from megatron_bipe.checkpoint.commit import tidy
from megatron_bipe.checkpoint.find import list_steps, read_data_record
from megatron_bipe.config.load import dump_yaml, load_run_config
from megatron_bipe.config.schema import ALLOWABLE, AUTO, ComputePrecision, RunConfig
from megatron_bipe.data.blend import PATTERN_SLOTS
from megatron_bipe.data.manifest import TOKENIZER_FOLDER, BlendMember, DataRecord
from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.io import locked, write_atomically
from megatron_bipe.runtime.hardware import PrecisionChoice, choose_precision

# What a continued run may change without becoming another run.
_FREE = {
    "run_dir",
    "data.path",  # its content is compared through data.json
    "data.valid_path",
    "data.segments",
    "train.steps",  # the decay then ends at the new number, unless optimizer.decay_steps holds it
    "train.micro_batch",
    "train.log_every",
    "train.valid_every",
    "train.valid_samples",
    "train.save_every",
    "train.check_replicas_every",
    "data.verify",
    "health",
    "parallel",  # checkpoints say nothing of a layout
    "checkpoint",
}


class _Difference(NamedTuple):
    """Something that is not as it was."""

    key: str  # of the configuration; "data": of the training data; "": neither
    text: str

    @property
    def allowable(self) -> str:
        """What `--allow` calls it; "" where nothing does."""
        return next((name for name in ALLOWABLE if self.key == name or self.key.startswith(f"{name}.")), "")


def settle_precision(
    run: RunConfig, device: torch.device, allow: Collection[str] = ()
) -> tuple[RunConfig, PrecisionChoice]:
    """Replace `train.precision=auto` by what this run computes in.

    A run that has a checkpoint keeps the precision it has, on a machine of another kind, too, unless `allow` names
    `train.precision`; else the hardware decides.

    Args:
        run: the run as it is asked for.
        device: where this rank's part of the model will be.
        allow: of `ALLOWABLE`, what may be other than before.

    Returns:
        The run with `bf16` or `fp32`, and that choice with its reason.
    """
    kept = _precision_to_keep(run, allow)
    choice = choose_precision(kept or run.train.precision, device, "train.precision")
    if kept:
        choice = choice._replace(reason=f"auto: {run.run_dir} began in it")
    train = run.train.model_copy(update={"precision": choice.precision})
    return run.model_copy(update={"train": train}), choice


@contextmanager
def lock_run_dir(run: RunConfig, record: DataRecord, allow: Collection[str], is_main: bool) -> Iterator[None]:
    """Keep other launches out of a run folder that holds this run, or nothing yet; every rank enters.

    The main rank's lock is the launch's: others write nothing there but files that it publishes. What a broken-off save
    left is cleared away.

    Raises:
        DataError: another launch is at work there.
        CheckpointError, ConfigError: as `check_same_run`.
    """
    with locked(run.run_dir / "running", partial(tidy, run.run_dir)) if is_main else nullcontext():
        check_same_run(run, record, allow)
        yield


def check_same_run(run: RunConfig, record: DataRecord, allow: Collection[str] = ()) -> None:
    """Refuse to continue a run folder as another run than it holds.

    Args:
        run: the run as it is to go on.
        record: of its training data.
        allow: of `ALLOWABLE`, what may be other than before.

    Raises:
        CheckpointError: the folder holds another run: every difference is named.
        ConfigError: what is to be allowed is not allowable.
    """
    if unknown := sorted(set(allow) - set(ALLOWABLE)):
        raise ConfigError(
            f"{', '.join(unknown)} cannot be allowed to change in a run; what can is {', '.join(ALLOWABLE)}",
            remedy="Leave it out, or start anew with --set run_dir=OTHER",
            location="--allow",
        )
    if not list_steps(run.run_dir):
        return
    old_run = load_run_config(run.run_dir / "config.yaml")
    found = [*_differences(old_run, run), *_data_differences(read_data_record(run.run_dir), record)]
    refused = [difference for difference in found if difference.allowable not in allow]
    if refused:
        names = sorted({difference.allowable for difference in refused if difference.allowable})
        flags = f", let these go on changed with --allow {' '.join(names)}" if names else ""
        raise CheckpointError(
            f"the run folder holds another run: {'; '.join(difference.text for difference in refused)}",
            remedy=f"Undo these changes to continue it{flags}, or start anew with --set run_dir=OTHER",
            location=run.run_dir,
        )


def _precision_to_keep(run: RunConfig, allow: Collection[str]) -> ComputePrecision | None:
    """Return the precision of the checkpoints that a run with `auto` would continue; None where it is free."""
    if run.train.precision != AUTO or "train.precision" in allow or not list_steps(run.run_dir):
        return None
    before = load_run_config(run.run_dir / "config.yaml").train.precision
    return None if before == AUTO else before


def write_run_folder(run: RunConfig, record: DataRecord, tokenizer: Tokenizer) -> None:
    """Write what describes the run; called on one rank, once all have read what an earlier start wrote."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.copy_to(run.run_dir / TOKENIZER_FOLDER)
    described = record.model_dump_json(indent=2, exclude_defaults=True)
    write_atomically(run.run_dir / "data.json", f"{described}\n".encode())
    write_atomically(run.run_dir / "config.yaml", dump_yaml(run).encode())


def _differences(old: RunConfig, new: RunConfig) -> Iterator[_Difference]:
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    for key, value in after.items():
        if key not in _FREE and before.get(key) != value:
            yield _Difference(key, f"{key} was {before.get(key)!r} and is now {value!r}")


def _data_differences(old: DataRecord, new: DataRecord) -> Iterator[_Difference]:
    if old.tokenizer.fingerprint != new.tokenizer.fingerprint:
        what = f"tokenizer was {old.tokenizer.fingerprint[:12]} and is now {new.tokenizer.fingerprint[:12]}"
        yield _Difference("", what)
    if old.rule != new.rule:
        yield _Difference("", f"segment rule was {old.rule.spec} and is now {new.rule.spec}")
    if len(old.blend) != len(new.blend):
        yield _Difference("data", f"the training data was {_size(old)} and is now {_size(new)}")
    elif old.blend:
        yield from (_Difference("data", what) for what in _member_differences(old.blend, new.blend))
    elif old.fingerprint != new.fingerprint:
        yield _Difference("data", f"dataset was {old.fingerprint[:12]} and is now {new.fingerprint[:12]}")


def _member_differences(old: Sequence[BlendMember], new: Sequence[BlendMember]) -> Iterator[str]:
    for number, (before, after) in enumerate(zip(old, new, strict=True), start=1):
        if before.fingerprint != after.fingerprint:
            was, now = (f"{member.path} ({member.fingerprint[:12]})" for member in (before, after))
            yield f"dataset {number} of the blend was {was} and is now {now}"
        if before.slots != after.slots:
            was, now = (f"{member.slots / PATTERN_SLOTS:.2%}" for member in (before, after))
            yield f"the share of dataset {number} of the blend, {after.path}, was {was} and is now {now}"


def _size(record: DataRecord) -> str:
    return f"a blend of {len(record.blend)} datasets" if record.blend else "one dataset"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and prefix + key not in _FREE:  # sections that are free as a whole, blends
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
