"""The text of `--dry-run`: configuration, layers, layout, memory, communication, time, length and data of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_bipe.checkpoint.disk_space import plan_disk
from megatron_bipe.checkpoint.find import branch_step, num_own_steps
from megatron_bipe.config import ModelConfig, RunConfig, accumulation_steps, dump_yaml, zero_stage
from megatron_bipe.data.blend import PATTERN_SLOTS, count_slots
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.errors import BipeError
from megatron_bipe.estimate.communication import bubble, step_traffic
from megatron_bipe.estimate.memory import StageMemory, stage_memories
from megatron_bipe.estimate.step_time import StepTime, predict_step, unpredictable
from megatron_bipe.model import count_parameters, make_plan, train_flops_per_token
from megatron_bipe.runtime.gpus import Gpu
from megatron_bipe.runtime.hardware import Choices, PrecisionChoice, choose_compile
from megatron_bipe.text_table import text_table

_DAY_S = 86400


def describe(
    run: RunConfig, ds_config: dict[str, Any], num_ranks: int, choices: Choices, gpu: Gpu | None = None
) -> str:
    """Return the text that `--dry-run` prints.

    Args:
        run: the run configuration, validated for `num_ranks`, its precision resolved.
        ds_config: result of `config.deepspeed.engine_config`.
        num_ranks: ranks of the described launch.
        choices: precision and compilation, with their reasons.
        gpu: the GPU of every rank; None: memory and communication are those of CPU ranks, and no time is predicted.
    """
    stages = stage_memories(run, ds_config, num_ranks, on_gpu=gpu is not None)
    parts = [
        "# Resolved configuration\n" + dump_yaml(run),
        "# Precision\n" + _precision(run, choices.precision, gpu),
        f"# Compilation\n{choices.compiles}\n",
        "# Layers\n" + layer_table(run.model),
        "# Layout\n" + _layout(run, ds_config, num_ranks),
        "# Stages\n" + _stage_table(stages) + _bubble(run, num_ranks),
        "# Memory per rank of each stage, GiB (estimate)\n" + _memory_table(stages, gpu),
        "# Bytes sent per rank and step, GiB (estimate)\n" + _traffic_table(run, ds_config, num_ranks),
        *(["# Time of a step (prediction)\n" + _step_time(run, ds_config, num_ranks, gpu)] if gpu else []),
        "# Length\n" + _length(run, num_ranks),
        "# Checkpoints\n" + f"{plan_disk(run, sum(count_parameters(run.model)))}\n",
        "# Data\n" + describe_data(run),
    ]
    return "\n".join(parts)


def _precision(run: RunConfig, precision: PrecisionChoice, gpu: Gpu | None) -> str:
    is_guess = gpu is None and precision.reason.startswith("auto")
    hint = "chosen for this machine; --gpu plans for a GPU\n" if is_guess else ""
    return f"{run.train.precision} ({precision.reason})\n{hint}"


def layer_table(model: ModelConfig) -> str:
    """Return a table of the layers with kind and parameter count; identical neighbours share a row."""
    counts = count_parameters(model)
    kinds = [layer.kind for layer in make_plan(model, seed=0)]
    last = len(kinds) - 1
    rows = [("0", kinds[0], counts[0]), (f"1-{last - 1}", f"{kinds[1]} x {last - 1}", sum(counts[1:last]))]
    rows.append((str(last), kinds[last], counts[last]))
    cells = [(layers, kind, f"{count:,}") for layers, kind, count in rows]
    return text_table([("layers", "kind", "parameters"), *cells, _total(sum(counts))], left=[1]) + "\n"


def _total(count: int) -> tuple[str, ...]:
    return "", "total", f"{count:,}"


def _layout(run: RunConfig, ds_config: dict[str, Any], num_ranks: int) -> str:
    parallel = run.parallel
    stage_ranks, stride = parallel.tensor * parallel.context, num_ranks // parallel.pipeline
    starts = range(0, num_ranks, stride)
    first_replica = [f"{start}-{start + stage_ranks - 1}" if stage_ranks > 1 else str(start) for start in starts]
    return (
        f"{num_ranks} ranks = {parallel.tensor} tensor x {parallel.context} context x {parallel.pipeline} pipeline x "
        f"{parallel.data_ranks(num_ranks)} data, ZeRO {zero_stage(ds_config)}\n"
        f"the first model replica is on ranks {', '.join(first_replica)}: {stage_ranks} for each stage\n"
    )


def _stage_table(stages: Sequence[StageMemory]) -> str:
    rows = [
        (
            str(stage.stage),
            f"{stage.first_layer}-{stage.last_layer}",
            f"{stage.parameters:,}",
            f"{stage.cost_share:.1%}",
        )
        for stage in stages
    ]
    return text_table([("stage", "layers", "parameters per rank", "fraction of the cost"), *rows], left=[]) + "\n"


def _bubble(run: RunConfig, num_ranks: int) -> str:
    if run.parallel.pipeline == 1:
        return ""
    idle = f"an average stage waits {bubble(run, num_ranks):.1%} of a step"
    return f"{idle}: the pipeline fills and drains, and stage costs differ\n"


def _memory_table(stages: Sequence[StageMemory], gpu: Gpu | None) -> str:
    names = ["weights", "gradients", "optimizer", "activations", "logits", *(["gpu"] if gpu else [])]
    columns = [*names, "device", "host", "checkpoint_copy"]
    rows = [(str(stage.stage), *(f"{getattr(stage, name) / 2**30:.2f}" for name in columns)) for stage in stages]
    titles = {"gpu": "GPU's own", "device": "total", "checkpoint_copy": "host, checkpoint copy"}
    table = text_table([("stage", *(titles.get(name, name) for name in columns)), *rows], left=[]) + "\n"
    return table + (_fit(max(stage.device for stage in stages) / 2**30, gpu) if gpu else "")


def _fit(needed_gib: float, gpu: Gpu) -> str:
    sizes = f"{needed_gib:.1f} of {gpu.memory_gib:.1f} GiB of one {gpu.name}"
    if needed_gib <= gpu.memory_gib:
        return f"fits: {sizes}\n"
    return f"does not fit: {sizes}; lower train.micro_batch, set parallel.recompute, or shard more with ZeRO\n"


def _traffic_table(run: RunConfig, ds_config: dict[str, Any], num_ranks: int) -> str:
    rows = [
        (kind.axis, kind.what, f"{kind.times:,}", f"{kind.bytes_sent / 2**30:.2f}")
        for kind in step_traffic(run, ds_config, num_ranks)
    ]
    return text_table([("axis", "what", "times", "GiB"), *rows], left=[0, 1]) + "\n" if rows else "nothing: one rank\n"


def _step_time(run: RunConfig, ds_config: dict[str, Any], num_ranks: int, gpu: Gpu) -> str:
    if setting := unpredictable(run, ds_config):
        return f"not predicted {setting}\n"
    step = predict_step(run, ds_config, num_ranks, gpu)
    parts = zip(StepTime._fields, step, strict=True)
    seconds = {name.removesuffix("_s").replace("_", " "): value for name, value in parts if name.endswith("_s")}
    rows = [(name, f"{1000 * part:.1f}", f"{part / step.total_s:.1%}") for name, part in seconds.items() if part]
    rows.append(("total", f"{1000 * step.total_s:.1f}", ""))
    code = "compiled" if choose_compile(run, zero_stage(ds_config), on_gpu=True).compiles else "eager"
    days = num_own_steps(run) * step.total_s / _DAY_S
    rates = f"{step.tokens_per_second:,.0f} tokens/s, {step.mfu:.0%} MFU, {days:,.1f} days for all steps"
    table = text_table([("part", "ms", "of the step"), *rows], left=[0])
    return f"{table}\n{rates}, on {num_ranks} x {gpu.name} with {code} blocks; nothing was measured\n"


def _length(run: RunConfig, num_ranks: int) -> str:
    train = run.train
    tokens_per_step = train.global_batch * train.seq_len_tokens
    steps, begin = num_own_steps(run), branch_step(run)
    total = tokens_per_step * steps
    flops = train_flops_per_token(run.model, train.seq_len_tokens) * total
    replicas = run.parallel.data_ranks(num_ranks)
    continues = f"a branch: steps {begin + 1:,} to {train.steps:,}, after {train.branch_from}\n" if begin else ""
    return continues + (
        f"{steps:,} steps x {tokens_per_step:,} tokens = {total:,} tokens, {flops:.3g} FLOPs\n"
        f"a step: {replicas} model replicas x {accumulation_steps(train, replicas)} micro-batches x "
        f"{train.micro_batch} sequences of {train.seq_len_tokens} tokens\n"
    )


def describe_data(run: RunConfig) -> str:
    """Return a line for each dataset of a run: its part of the blend, its size, and how often the run reads it."""
    try:
        manifests = [Manifest.load(folder) for folder in run.data.folders]
        weights = run.data.weights or [max(1, manifest.num_tokens) for manifest in manifests]
        slots = count_slots(weights, run.data.folders)
    except BipeError as error:
        return f"not usable yet: {error}\n"
    rows = zip(run.data.folders, manifests, slots, strict=True)
    return "".join(_dataset_line(run, folder, manifest, slots / PATTERN_SLOTS) for folder, manifest, slots in rows)


def _dataset_line(run: RunConfig, folder: Path, manifest: Manifest, fraction: float) -> str:
    blend_part = f"{fraction:.2%} of the sequences; " if fraction < 1 else ""
    sequences = fraction * num_own_steps(run) * run.train.global_batch
    if manifest.examples:
        num_examples = manifest.num_documents // 2
        content, times = f"{num_examples:,} examples of {manifest.examples.task}", sequences / max(1, num_examples)
    else:
        content = f"{manifest.num_documents:,} documents"
        times = sequences * run.train.seq_len_tokens / max(1, manifest.num_tokens)
    return (
        f"{folder}: {blend_part}{manifest.num_tokens:,} tokens in {content}, "
        f"segments {manifest.rule.spec}; the {'branch' if branch_step(run) else 'run'} reads it {times:.2f} times\n"
    )
