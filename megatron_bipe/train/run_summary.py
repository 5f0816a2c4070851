"""Summaries that a run logs at its start and end: configuration, hardware, results and next commands."""

import shlex

import torch

from megatron_bipe.config.deepspeed import zero_stage
from megatron_bipe.config.schema import RunConfig
from megatron_bipe.config.validate import accumulation_steps
from megatron_bipe.model.transformer import count_parameters
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.hardware import PrecisionChoice, device_name


def start_summary(run: RunConfig, ds_config: dict[str, object], mesh: Mesh, precision: PrecisionChoice) -> str:
    """Return the summary at the start of a run, a few lines.

    Args:
        run: the run configuration, validated.
        ds_config: result of `config.deepspeed.engine_config`.
        mesh: this rank, with the parallel layout.
        precision: compute precision and its reason.
    """
    train, replicas = run.train, mesh.data_ranks
    tokens_per_step = train.global_batch * train.seq_len_tokens
    threads = torch.get_num_threads()
    per_rank = f"{threads} thread{'s' * (threads > 1)} each" if mesh.device.type == "cpu" else "one GPU each"
    axes = {"tensor": mesh.tensor, "context": mesh.context, "pipeline": mesh.pipeline, "data": replicas}
    layout = " x ".join(f"{size} {axis}" for axis, size in axes.items() if size > 1) or "one model replica"
    rows = {
        "model": f"{run.model.encoding}, {sum(count_parameters(run.model)):,} parameters",
        "device": f"{mesh.num_ranks} rank{'s' * (mesh.num_ranks > 1)}, {per_rank}: {device_name(mesh.device)}",
        "precision": f"{precision.precision} ({precision.reason})",
        "layout": f"{layout}, ZeRO {zero_stage(ds_config)}",
        "batch": f"{tokens_per_step:,} tokens a step: {replicas} x {accumulation_steps(train, replicas)} micro-batches "
        f"of {train.micro_batch} x {train.seq_len_tokens}",
        "length": f"{train.steps:,} steps, {train.steps * tokens_per_step:,} tokens",
        "run folder": str(run.run_dir),
    }
    return _aligned(rows)


def end_summary(run: RunConfig, step: int) -> str:
    """Return the summary after `step` updates: paths of the results and next commands."""
    run_dir = shlex.quote(str(run.run_dir))
    name = shlex.quote(run.run_dir.resolve().name)
    if step < run.train.steps:
        rows = {
            "stopped": f"after step {step:,} of {run.train.steps:,}, as requested by --stop-step",
            "next": "the same command without --stop-step resumes the run",
        }
    else:
        lengths = ",".join(str(factor * run.train.seq_len_tokens) for factor in (1, 2, 4, 8))
        data = shlex.quote(str(run.data.valid_path or "DIR"))
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
