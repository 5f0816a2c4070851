"""What a run may change when it resumes, or branches from another run.

Settings that give the training state another meaning may never change; some others may with `--allow`, because they
change the loss curve. Of the learning rate, only the updates that were already made count.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from megatron_bipe.checkpoint.find import find_trunk, list_steps, newest_first, read_data_record, split_step
from megatron_bipe.checkpoint.manifest import load_config, load_index
from megatron_bipe.config import ALLOWABLE, RunConfig, load_run_config
from megatron_bipe.data.blend import PATTERN_SLOTS
from megatron_bipe.data.dataset import describe_special_in_text, special_in_text_differs
from megatron_bipe.data.manifest import BlendMember, DataRecord
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.train.schedule import first_changed_rate

# Fields that a resumed run may change freely.
_FREE = {
    "run_dir",
    "data.path",  # its content is compared by data.json
    "data.valid_path",
    "data.valid",
    "data.segments",
    "train.steps",  # but not the end of the decay, which follows it by default: see `_schedule_differences`
    "optimizer.decay_steps",
    "train.micro_batch",
    "train.compile",  # changes results by rounding only, and a checkpoint may move to another machine
    "train.log_every",
    "train.valid_every",
    "train.valid_samples",
    "train.valid_lengths",
    "train.branch_from",  # read only where there is no checkpoint
    "train.save_every",
    "train.check_replicas_every",
    "train.deterministic",  # changes results of a GPU by their rounding, as a different GPU would
    "data.verify",
    "health",
    "parallel",  # checkpoints are independent of the layout
    "checkpoint",
    "tracking",
    "alerts",
}


# Fields of the learning rate, which may change freely as long as no update that was made would have another rate.
_RATES = {f"optimizer.{name}" for name in ("lr", "min_lr", "warmup_steps", "decay", "decay_start", "decay_power")}
_INIT = "train.init_from"  # read only where there is no checkpoint, so that a branch has none


class _Difference(NamedTuple):
    """A difference between a run and its folder, or the run that it branches from."""

    key: str  # field of the configuration; "data": the training data; "": neither
    text: str

    @property
    def allowable(self) -> str:
        """Name for `--allow`; "" if it cannot be allowed."""
        return next((name for name in ALLOWABLE if self.key == name or self.key.startswith(f"{name}.")), "")


def check_same_run(run: RunConfig, record: DataRecord | None, allow: Collection[str] = ()) -> None:
    """Check that the run folder can be resumed with this configuration and data.

    Args:
        run: the requested run configuration.
        record: record of its training data; None: compare the configuration only.
        allow: names of `ALLOWABLE` that may differ from the existing run.

    Raises:
        CheckpointError: the folder holds another run; lists every difference.
        ConfigError: `allow` contains a name that is not allowable.
    """
    if unknown := sorted(set(allow) - set(ALLOWABLE)):
        raise ConfigError(
            f"{', '.join(unknown)} cannot be allowed to change in a run; only {', '.join(ALLOWABLE)} can",
            remedy="Remove it, or start a new run with --set run_dir=OTHER",
            location="--allow",
        )
    if not list_steps(run.run_dir):
        return
    old_run = load_run_config(run.run_dir / "config.yaml")
    found = [*_differences(old_run, run, newest_first(run.run_dir)[0].step)]
    if record is not None:
        found += _data_differences(read_data_record(run.run_dir), record)
    if refused := _refused(found, allow):
        raise CheckpointError(
            f"the run folder holds another run: {_listed(refused)}",
            remedy=f"Undo these changes to resume it{_flags(refused)}, or start a new run with --set run_dir=OTHER",
            location=run.run_dir,
        )


def check_branch(run: RunConfig, record: DataRecord | None, allow: Collection[str] = ()) -> None:
    """Check that a run without checkpoints can continue the one that `train.branch_from` names, if it names one.

    The configuration of that checkpoint counts, since its run may have changed settings later. The bytes of its tensors
    are verified where they are loaded.

    Args:
        run: the requested run configuration.
        record: record of its training data; None: compare the configuration only.
        allow: names of `ALLOWABLE` that may differ from the other run.

    Raises:
        ConfigError: the run would branch from itself, or ends before the branch begins.
        CheckpointError: there is no such checkpoint, it is damaged, or of a run that this one may not continue; lists
            every difference.
    """
    spec = run.train.branch_from
    if spec is None:
        return
    if split_step(spec)[0].resolve() == run.run_dir.resolve():
        raise ConfigError(
            f"train.branch_from={spec} is in the folder of this run, which would continue and change it",
            remedy="Give the branch its own folder: --set run_dir=OTHER",
            location="train.branch_from",
        )
    if list_steps(run.run_dir):
        return
    trunk = find_trunk(spec)
    if run.train.steps <= trunk.step:
        raise ConfigError(
            f"train.steps={run.train.steps}, but the branch begins after step {trunk.step}; steps count from the "
            "beginning of the other run",
            remedy=f"Set train.steps to more than {trunk.step}",
            location="train.steps",
        )
    old_run, old_record = load_config(trunk.folder), load_index(trunk.folder).data
    found = [difference for difference in _differences(old_run, run, trunk.step) if difference.key != _INIT]
    if record is not None and old_record is not None:
        found += _data_differences(old_record, record)
    if refused := _refused(found, allow):
        raise CheckpointError(
            f"the run cannot branch from {spec}: {_listed(refused)}",
            remedy=f"Undo these changes{_flags(refused)}, or use train.init_from, which takes only the weights",
            location=trunk.folder,
        )


def _refused(found: Sequence[_Difference], allow: Collection[str]) -> list[_Difference]:
    return [difference for difference in found if difference.allowable not in allow]


def _listed(refused: Sequence[_Difference]) -> str:
    return "; ".join(difference.text for difference in refused)


def _flags(refused: Sequence[_Difference]) -> str:
    names = sorted({difference.allowable for difference in refused if difference.allowable})
    return f", accept them with --allow {' '.join(names)}" if names else ""


def _differences(old: RunConfig, new: RunConfig, num_updates: int) -> Iterator[_Difference]:
    """Yield what differs; `num_updates` were made with the old configuration."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    for key, value in after.items():
        if key not in _FREE | _RATES and before.get(key) != value:
            yield _Difference(key, f"{key} was {before.get(key)!r} and is now {value!r}")
    changed = first_changed_rate(old, new, num_updates)
    if changed is not None:
        yield from _schedule_differences(old, new, f"the rate of update {changed + 1} of {num_updates}")


def _schedule_differences(old: RunConfig, new: RunConfig, rate: str) -> Iterator[_Difference]:
    before, after = (_flat({"optimizer": run.optimizer.model_dump()}) for run in (old, new))
    for key in sorted(_RATES):
        if before[key] != after[key]:
            yield _Difference(key, f"{key} was {before[key]!r} and is now {after[key]!r}, which changes {rate}")
    if old.decay_end and new.decay_end and old.decay_end != new.decay_end:
        fields = ("optimizer.decay_steps" if run.optimizer.decay_steps else "train.steps" for run in (old, new))
        was, now = (f"{run.decay_end} ({field})" for run, field in zip((old, new), fields, strict=True))
        yield _Difference(
            "optimizer.decay_steps",
            f"the decay of the learning rate ended at step {was} and now ends at step {now}, which changes {rate}; "
            f"--set optimizer.decay_steps={old.decay_end} keeps it",
        )


def _data_differences(old: DataRecord, new: DataRecord) -> Iterator[_Difference]:
    if old.tokenizer.fingerprint != new.tokenizer.fingerprint:
        text = f"the tokenizer was {old.tokenizer.fingerprint[:12]} and is now {new.tokenizer.fingerprint[:12]}"
        yield _Difference("", text)
    if special_in_text_differs(old.special_in_text, new.special_in_text):
        was, now = map(describe_special_in_text, (old.special_in_text, new.special_in_text))
        yield _Difference("", f"the training data was made {was} and is now made {now}")
    if old.rule != new.rule:
        yield _Difference("", f"the segment rule was {old.rule.spec} and is now {new.rule.spec}")
    if len(old.blend) != len(new.blend):
        yield _Difference("data", f"the training data was {_size(old)} and is now {_size(new)}")
    elif old.blend:
        yield from (_Difference("data", text) for text in _member_differences(old.blend, new.blend))
    elif old.fingerprint != new.fingerprint:
        yield _Difference("data", f"the dataset was {old.fingerprint[:12]} and is now {new.fingerprint[:12]}")


def _member_differences(old: Sequence[BlendMember], new: Sequence[BlendMember]) -> Iterator[str]:
    for number, (before, after) in enumerate(zip(old, new, strict=True), start=1):
        if before.fingerprint != after.fingerprint:
            was, now = (f"{member.path} ({member.fingerprint[:12]})" for member in (before, after))
            yield f"dataset {number} of the blend was {was} and is now {now}"
        if before.slots != after.slots:
            was, now = (f"{member.slots / PATTERN_SLOTS:.2%}" for member in (before, after))
            yield f"the fraction of dataset {number} of the blend, {after.path}, was {was} and is now {now}"


def _size(record: DataRecord) -> str:
    return f"a blend of {len(record.blend)} datasets" if record.blend else "one dataset"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and prefix + key not in _FREE:  # not in fully free sections and blends
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
