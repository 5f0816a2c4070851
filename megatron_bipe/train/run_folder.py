"""The folder of a run: created at its first start, resumed by later ones, and never shared with another run.

RUN/config.yaml       the resolved configuration
RUN/data.json         tokenizer, segment rule and fingerprint of the training data
RUN/tokenizer/        the tokenizer's files, so that an export needs nothing else
RUN/metrics.jsonl     one line per step
RUN/events.jsonl      one line for each start, stop, bad step etc.
RUN/tensorboard/      the same metrics for TensorBoard
RUN/checkpoints/      see checkpoint/find.py
RUN/running/          exists while a launch is running: holds its lock

Also the summaries that a run logs at its start and end.
"""

import shlex
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from megatron_bipe.checkpoint.commit import tidy
from megatron_bipe.checkpoint.disk_space import plan_disk
from megatron_bipe.checkpoint.find import list_steps, newest_first, read_data_record
from megatron_bipe.config import (
    ALLOWABLE,
    AUTO,
    ComputePrecision,
    RunConfig,
    accumulation_steps,
    dump_yaml,
    load_run_config,
    zero_stage,
)
from megatron_bipe.data.blend import PATTERN_SLOTS
from megatron_bipe.data.dataset import describe_special_in_text, special_in_text_differs
from megatron_bipe.data.manifest import TOKENIZER_FOLDER, BlendMember, DataRecord
from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.io import locked, write_atomically
from megatron_bipe.model import count_parameters
from megatron_bipe.parallel import Mesh
from megatron_bipe.run_files import LOCK_FOLDER
from megatron_bipe.runtime.environment import batch_job
from megatron_bipe.runtime.gpus import Gpu
from megatron_bipe.runtime.hardware import Choices, PrecisionChoice, choose_precision, device_name
from megatron_bipe.train.metrics_file import last_step_text

# Fields that a resumed run may change freely.
_FREE = {
    "run_dir",
    "data.path",  # its content is compared by data.json
    "data.valid_path",
    "data.valid",
    "data.segments",
    "train.steps",  # but not the end of the decay, which follows it by default: see `_differences`
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


class _Difference(NamedTuple):
    """A difference between a run and its folder."""

    key: str  # field of the configuration; "data": the training data; "": neither
    text: str

    @property
    def allowable(self) -> str:
        """Name for `--allow`; "" if it cannot be allowed."""
        return next((name for name in ALLOWABLE if self.key == name or self.key.startswith(f"{name}.")), "")


def resolve_precision(
    run: RunConfig, device: torch.device, allow: Collection[str] = (), planned_gpu: Gpu | None = None
) -> tuple[RunConfig, PrecisionChoice]:
    """Replace `train.precision=auto` by the compute precision of this run.

    A run that has a checkpoint keeps its precision, also on different hardware, unless `allow` contains
    `train.precision`; otherwise the hardware determines it.

    Args:
        run: the requested run configuration.
        device: device of this rank.
        allow: names of `ALLOWABLE` that may differ from the existing run.
        planned_gpu: the GPU that a run is planned for, in place of the device.

    Returns:
        The run with `bf16` or `fp32`, and the choice with its reason.
    """
    kept = _precision_to_keep(run, allow)
    asked = kept or run.train.precision
    if planned_gpu is None:
        choice = choose_precision(asked, device, "train.precision")
    elif asked == AUTO:
        choice = PrecisionChoice("bf16", f"auto: {planned_gpu.name} multiplies bf16 natively")
    else:
        choice = PrecisionChoice(asked, f"train.precision={asked}")
    if kept:
        choice = choice._replace(reason=f"auto: the precision of {run.run_dir}")
    train = run.train.model_copy(update={"precision": choice.precision})
    return run.model_copy(update={"train": train}), choice


@contextmanager
def lock_run_dir(run: RunConfig, record: DataRecord, allow: Collection[str], is_main: bool) -> Iterator[None]:
    """Lock a run folder that is empty or holds this run; every rank enters.

    The main rank holds the lock for the launch: other ranks only write files there that it publishes. Remains of an
    interrupted save are deleted.

    Raises:
        DataError: another launch holds the lock (transient).
        CheckpointError, ConfigError: as in `check_same_run`.
    """
    lock = locked(
        run.run_dir / LOCK_FOLDER,
        partial(tidy, run.run_dir),
        job=batch_job(),
        progress=partial(last_step_text, run.run_dir),
    )
    with lock if is_main else nullcontext():
        check_same_run(run, record, allow)
        yield


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
    found = [*_differences(old_run, run)]
    if record is not None:
        found += _data_differences(read_data_record(run.run_dir), record)
    refused = [difference for difference in found if difference.allowable not in allow]
    if refused:
        names = sorted({difference.allowable for difference in refused if difference.allowable})
        flags = f", accept them with --allow {' '.join(names)}" if names else ""
        raise CheckpointError(
            f"the run folder holds another run: {'; '.join(difference.text for difference in refused)}",
            remedy=f"Undo these changes to resume it{flags}, or start a new run with --set run_dir=OTHER",
            location=run.run_dir,
        )


def _precision_to_keep(run: RunConfig, allow: Collection[str]) -> ComputePrecision | None:
    """Return the precision of the checkpoints that a run with `auto` resumes; None if there is no constraint."""
    if run.train.precision != AUTO or "train.precision" in allow or not list_steps(run.run_dir):
        return None
    before = load_run_config(run.run_dir / "config.yaml").train.precision
    return None if before == AUTO else before


def write_run_folder(run: RunConfig, record: DataRecord, tokenizer: Tokenizer) -> None:
    """Write configuration, data record and tokenizer; called on one rank after all have read the earlier files."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.copy_to(run.run_dir / TOKENIZER_FOLDER)
    data_json = record.model_dump_json(indent=2, exclude_defaults=True)
    write_atomically(run.run_dir / "data.json", f"{data_json}\n".encode())
    write_atomically(run.run_dir / "config.yaml", dump_yaml(run).encode())


def _differences(old: RunConfig, new: RunConfig) -> Iterator[_Difference]:
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    for key, value in after.items():
        if key not in _FREE and before.get(key) != value:
            yield _Difference(key, f"{key} was {before.get(key)!r} and is now {value!r}")
    if old.decay_end and new.decay_end and old.decay_end != new.decay_end:
        fields = ("optimizer.decay_steps" if run.optimizer.decay_steps else "train.steps" for run in (old, new))
        was, now = (f"{run.decay_end} ({field})" for run, field in zip((old, new), fields, strict=True))
        yield _Difference(
            "optimizer.decay_steps",
            f"the decay of the learning rate ended at step {was} and now ends at step {now}, which changes the rate of "
            f"all later steps; --set optimizer.decay_steps={old.decay_end} keeps it",
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


def start_summary(run: RunConfig, ds_config: dict[str, object], mesh: Mesh, choices: Choices) -> str:
    """Return the summary at the start of a run, a few lines.

    Args:
        run: the run configuration, validated.
        ds_config: result of `config.deepspeed.engine_config`.
        mesh: this rank, with the parallel layout.
        choices: precision and compilation, with their reasons.
    """
    train, replicas = run.train, mesh.data_ranks
    tokens_per_step = train.global_batch * train.seq_len_tokens
    threads = torch.get_num_threads()
    per_rank = f"{threads} thread{'s' * (threads > 1)} each" if mesh.device.type == "cpu" else "one GPU each"
    axes = {"tensor": mesh.tensor, "context": mesh.context, "pipeline": mesh.pipeline, "data": replicas}
    layout = " x ".join(f"{size} {axis}" for axis, size in axes.items() if size > 1) or "one model replica"
    num_parameters = sum(count_parameters(run.model))
    rows = {
        "model": f"{run.model.encoding}, {num_parameters:,} parameters",
        "device": f"{mesh.num_ranks} rank{'s' * (mesh.num_ranks > 1)}, {per_rank}: {device_name(mesh.device)}",
        "precision": f"{choices.precision.precision} ({choices.precision.reason})",
        "compile": str(choices.compiles),
        "layout": f"{layout}, ZeRO {zero_stage(ds_config)}",
        "batch": f"{tokens_per_step:,} tokens a step: {replicas} x {accumulation_steps(train, replicas)} micro-batches "
        f"of {train.micro_batch} x {train.seq_len_tokens}",
        "length": f"{train.steps:,} steps, {train.steps * tokens_per_step:,} tokens",
        "run folder": str(run.run_dir),
        "checkpoints": str(plan_disk(run, num_parameters)),
    }
    return _aligned(rows)


def end_summary(run: RunConfig, stop_step: int) -> str:
    """Return the summary of a run that has reached `stop_step`: paths of the results and next commands.

    A run whose checkpoint is beyond that step was not trained, so its own step is stated.
    """
    step = max(stop_step, *(checkpoint.step for checkpoint in newest_first(run.run_dir)[:1]), 0)
    run_dir = shlex.quote(str(run.run_dir))
    name = shlex.quote(run.run_dir.resolve().name)
    if step < run.train.steps:
        reason = "as requested by" if step == stop_step else "which is beyond that of"
        rows = {
            "stopped": f"after step {step:,} of {run.train.steps:,}, {reason} --stop-step",
            "next": "the same command without --stop-step resumes the run",
        }
    else:
        lengths = ",".join(str(factor * run.train.seq_len_tokens) for factor in (1, 2, 4, 8))
        data = shlex.quote(str(next(iter(run.data.valid_sets.values()), "DIR")))
        rows = {
            "done": f"{step:,} steps",
            "checkpoint": f"{run_dir}/checkpoints/step-{step:08d}",
            "metrics": f"{run_dir}/metrics.jsonl, or: tensorboard --logdir {run_dir}/tensorboard",
            "next": f"python tools/evaluate.py perplexity --model {run_dir} --data {data} --lengths {lengths} "
            f"--output results/{name}",
            "and": f"python tools/export_hf.py --checkpoint {run_dir} --output exported/{name}",
        }
    return _aligned(rows)


def _aligned(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{key:{width}}  {text}" for key, text in rows.items())
