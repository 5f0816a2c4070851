"""The folder of a run: started once, continued ever after, never mixed with another run's.

RUN/config.yaml       the resolved configuration
RUN/data.json         tokenizer, segment rule and fingerprint of the training data
RUN/tokenizer/        the tokenizer's files, so that an export needs nothing else
RUN/metrics.jsonl     one line a step
RUN/events.jsonl      one line for each start, stop, bad step and the like
RUN/tensorboard/      the same for TensorBoard
RUN/checkpoints/      see engine/checkpoint.py
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_bipe.config.load import dump_yaml, load_run_config
from megatron_bipe.config.schema import RunConfig
from megatron_bipe.data.blend import PATTERN_SLOTS
from megatron_bipe.data.manifest import TOKENIZER_FOLDER, BlendMember, DataRecord
from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.engine.checkpoint import Checkpoint, find_checkpoint, list_steps
from megatron_bipe.errors import CheckpointError

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
    "health",
    "parallel",  # checkpoints say nothing of a layout
}


def resume_point(run: RunConfig, record: DataRecord) -> Checkpoint | None:
    """The checkpoint that the run folder is to be continued from; None to start.

    Raises:
        CheckpointError: the folder holds another run: every difference is named.
    """
    if not list_steps(run.run_dir):
        return None
    old_run = load_run_config(run.run_dir / "config.yaml")
    old_record = read_record(run.run_dir)
    differences = [*_differences(old_run, run), *_data_differences(old_record, record)]
    if differences:
        raise CheckpointError(
            f"the run folder holds another run: {'; '.join(differences)}",
            remedy="Undo these changes to continue it, or start anew with --set run_dir=OTHER",
            place=run.run_dir,
        )
    return find_checkpoint(run.run_dir)


def write_run_folder(run: RunConfig, record: DataRecord, tokenizer: Tokenizer) -> None:
    """Write what describes the run; called on one rank, once all have read what an earlier start wrote."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    (run.run_dir / "config.yaml").write_text(dump_yaml(run), encoding="utf-8")
    described = record.model_dump_json(indent=2, exclude_defaults=True)
    (run.run_dir / "data.json").write_text(described + "\n", encoding="utf-8")
    tokenizer.copy_to(run.run_dir / TOKENIZER_FOLDER)


def read_record(run_dir: Path) -> DataRecord:
    """What the run was trained on.

    Raises:
        CheckpointError: the record is missing or damaged.
    """
    path = run_dir / "data.json"
    try:
        return DataRecord.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the record of the training data cannot be read: {error}",
            remedy="Copy the whole run folder again",
            place=path,
        ) from error


def _differences(old: RunConfig, new: RunConfig) -> Iterator[str]:
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    for key, value in after.items():
        if key not in _FREE and before.get(key) != value:
            yield f"{key} was {before.get(key)!r} and is now {value!r}"


def _data_differences(old: DataRecord, new: DataRecord) -> Iterator[str]:
    if old.tokenizer.fingerprint != new.tokenizer.fingerprint:
        yield f"tokenizer was {old.tokenizer.fingerprint[:12]} and is now {new.tokenizer.fingerprint[:12]}"
    if old.rule != new.rule:
        yield f"segment rule was {old.rule.spec} and is now {new.rule.spec}"
    if len(old.blend) != len(new.blend):
        yield f"the training data was {_size(old)} and is now {_size(new)}"
    elif old.blend:
        yield from _member_differences(old.blend, new.blend)
    elif old.fingerprint != new.fingerprint:
        yield f"dataset was {old.fingerprint[:12]} and is now {new.fingerprint[:12]}"


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
