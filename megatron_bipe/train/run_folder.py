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
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

import torch

from megatron_bipe.checkpoint.commit import tidy
from megatron_bipe.checkpoint.disk_space import plan_disk
from megatron_bipe.checkpoint.find import branch_step, find_trunk, list_steps, newest_first, num_own_steps
from megatron_bipe.checkpoint.manifest import load_config
from megatron_bipe.config import (
    AUTO,
    ComputePrecision,
    Precision,
    RunConfig,
    accumulation_steps,
    dump_yaml,
    load_run_config,
    zero_stage,
)
from megatron_bipe.data.manifest import TOKENIZER_FOLDER, DataRecord
from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.errors import CheckpointError
from megatron_bipe.io import locked, write_atomically
from megatron_bipe.model import count_parameters
from megatron_bipe.parallel import Mesh
from megatron_bipe.run_files import LOCK_FOLDER
from megatron_bipe.runtime.environment import batch_job
from megatron_bipe.runtime.gpus import Gpu
from megatron_bipe.runtime.hardware import Choices, PrecisionChoice, choose_precision, device_name
from megatron_bipe.train.metrics_file import last_step_text
from megatron_bipe.train.run_changes import check_branch, check_same_run


def resolve_precision(
    run: RunConfig, device: torch.device, allow: Collection[str] = (), planned_gpu: Gpu | None = None
) -> tuple[RunConfig, PrecisionChoice]:
    """Replace `train.precision=auto` by the compute precision of this run.

    A run that has a checkpoint keeps its precision, also on different hardware, unless `allow` contains
    `train.precision`, and a branch has that of its trunk; otherwise the hardware determines it.

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
        source = run.run_dir if list_steps(run.run_dir) else run.train.branch_from
        choice = choice._replace(reason=f"auto: the precision of {source}")
    train = run.train.model_copy(update={"precision": choice.precision})
    return run.model_copy(update={"train": train}), choice


@contextmanager
def lock_run_dir(run: RunConfig, record: DataRecord, allow: Collection[str], is_main: bool) -> Iterator[None]:
    """Lock a run folder that is empty or holds this run; every rank enters.

    The main rank holds the lock for the launch: other ranks only write files there that it publishes. Remains of an
    interrupted save are deleted.

    Raises:
        DataError: another launch holds the lock (transient).
        CheckpointError, ConfigError: as in `check_same_run` and `check_branch`.
    """
    is_new = is_main and not run.run_dir.exists()
    lock = locked(
        run.run_dir / LOCK_FOLDER,
        partial(tidy, run.run_dir),
        job=batch_job(),
        progress=partial(last_step_text, run.run_dir),
    )
    try:
        with lock if is_main else nullcontext():
            check_branch(run, record, allow)  # first: it names a run that would branch from itself
            check_same_run(run, record, allow)
            yield
    finally:
        if is_new:
            with suppress(OSError):
                run.run_dir.rmdir()  # of a start that was refused; succeeds only if it is empty


def _precision_to_keep(run: RunConfig, allow: Collection[str]) -> ComputePrecision | None:
    """Return the precision of the checkpoints that a run with `auto` continues; None if there is no constraint."""
    if run.train.precision != AUTO or "train.precision" in allow:
        return None
    if list_steps(run.run_dir):
        before = load_run_config(run.run_dir / "config.yaml").train.precision
    elif (trunk := run.train.branch_from) is not None:
        before = _precision_of(trunk)
    else:
        return None
    return None if before == AUTO else before


def _precision_of(trunk: str) -> Precision:
    try:
        return load_config(find_trunk(trunk).folder).train.precision
    except CheckpointError:  # which `check_branch` reports
        return AUTO


def write_run_folder(run: RunConfig, record: DataRecord, tokenizer: Tokenizer) -> None:
    """Write configuration, data record and tokenizer; called on one rank after all have read the earlier files."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.copy_to(run.run_dir / TOKENIZER_FOLDER)
    data_json = record.model_dump_json(indent=2, exclude_defaults=True)
    write_atomically(run.run_dir / "data.json", f"{data_json}\n".encode())
    write_atomically(run.run_dir / "config.yaml", dump_yaml(run).encode())


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
    own_steps, threads = num_own_steps(run), torch.get_num_threads()
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
        "length": f"{own_steps:,} steps, {own_steps * tokens_per_step:,} tokens",
        **({"branch of": f"{train.branch_from}, up to step {train.steps:,}"} if train.branch_from else {}),
        "run folder": str(run.run_dir),
        "checkpoints": str(plan_disk(run, num_parameters)),
    }
    return _aligned(rows)


def end_summary(run: RunConfig, stop_step: int) -> str:
    """Return the summary of a run that has reached `stop_step`: paths of the results and next commands.

    A run whose checkpoint is beyond that step was not trained, so its own step is stated.
    """
    own = newest_first(run.run_dir)
    step = max(stop_step, own[0].step if own else branch_step(run))
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
