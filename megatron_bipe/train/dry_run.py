"""What a run would be, without starting it: configuration, layers, parameters, memory, length."""

import itertools
from pathlib import Path
from typing import Any

from megatron_bipe.config.deepspeed import zero_stage
from megatron_bipe.config.load import dump_yaml
from megatron_bipe.config.schema import ModelConfig, RunConfig
from megatron_bipe.config.validate import accumulation_steps
from megatron_bipe.data.blend import PATTERN_SLOTS, slot_counts
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.errors import DataError
from megatron_bipe.model.plan import count_parameters, make_plan, train_flops_per_token
from megatron_bipe.parallel.stages import cut_stages


def describe(run: RunConfig, ds_config: dict[str, Any], num_ranks: int) -> str:
    """The text that `--dry-run` prints."""
    parts = [
        "# Resolved configuration\n" + dump_yaml(run),
        "# Layers\n" + layer_table(run.model),
        "# Memory of one rank, GiB (estimate)\n" + _memory_table(run, ds_config, num_ranks),
        "# Length\n" + _length(run, num_ranks),
        "# Data\n" + _data(run),
    ]
    return "\n".join(parts)


def layer_table(model: ModelConfig) -> str:
    """Index, kind and parameters of every layer, equal neighbours on one line."""
    counts = count_parameters(model)
    kinds = [layer.kind for layer in make_plan(model, seed=0)]
    last = len(kinds) - 1
    rows = [("0", kinds[0], counts[0]), (f"1-{last - 1}", f"{kinds[1]} x {last - 1}", sum(counts[1:last]))]
    rows.append((str(last), kinds[last], counts[last]))
    lines = [f"{index:>7}  {kind:<14}{count:>16,}" for index, kind, count in rows]
    return "\n".join([*lines, f"{'':>7}  {'total':<14}{sum(counts):>16,}\n"])


def memory_estimate_gib(run: RunConfig, stage: int, num_ranks: int) -> dict[str, float]:
    """GiB of one rank by purpose.

    Weights, gradients and optimizer state follow from the precision and the ZeRO stage; activations are what
    autograd keeps for backward (per token and block: 9 hidden widths, 4 inner widths) and three copies of the
    logits (compute precision, fp32, their gradient). Of stages, the one with most parameters is meant, with as many
    micro-batches under way as there are stages. What tensor parallelism and recomputation save of activations, and
    workspace of kernels and communication, is not counted.
    """
    model, train, parallel = run.model, run.train, run.parallel
    counts = count_parameters(model)
    bounds = cut_stages(model, train.seq_len_tokens, parallel.pipeline)
    stages = [counts[start:stop] for start, stop in itertools.pairwise(bounds)]
    parameters = max(map(sum, stages)) / parallel.tensor
    layers = model.num_layers / parallel.pipeline
    data_ranks = max(1, parallel.data_ranks(num_ranks))
    under_way = min(parallel.pipeline, max(1, accumulation_steps(train, data_ranks)))
    width = 2 if train.precision == "bf16" else 4
    tokens = train.micro_batch * train.seq_len_tokens
    block = 9 * model.hidden_size + 4 * model.ffn_size
    master = 4 if train.precision == "bf16" else 0
    sizes = {
        "weights": parameters * width / (data_ranks if stage == 3 else 1),
        "gradients": parameters * 4 / (data_ranks if stage >= 2 else 1),
        "optimizer": parameters * (8 + master) / (data_ranks if stage >= 1 else 1),
        "activations": under_way * tokens * width * layers * block,
        "logits": tokens * model.vocab_size / parallel.tensor * (width + 8),
    }
    return {name: size / 2**30 for name, size in sizes.items()}


def _memory_table(run: RunConfig, ds_config: dict[str, Any], num_ranks: int) -> str:
    stage = zero_stage(ds_config)
    sizes = memory_estimate_gib(run, stage, num_ranks)
    lines = [f"{name:>12}{size:>10.2f}" for name, size in sizes.items()]
    return "\n".join([*lines, f"{'total':>12}{sum(sizes.values()):>10.2f}", f"(ZeRO {stage}, {num_ranks} ranks)\n"])


def _length(run: RunConfig, num_ranks: int) -> str:
    train = run.train
    tokens_per_step = train.global_batch * train.seq_len_tokens
    total = tokens_per_step * train.steps
    flops = train_flops_per_token(run.model, train.seq_len_tokens) * total
    data_ranks = max(1, run.parallel.data_ranks(num_ranks))
    accumulation = accumulation_steps(train, data_ranks)
    return (
        f"{train.steps:,} steps x {tokens_per_step:,} tokens = {total:,} tokens, {flops:.3g} FLOPs\n"
        f"a step: {data_ranks} copies of the model x {accumulation} micro-batches x {train.micro_batch} windows of "
        f"{train.seq_len_tokens} tokens\n"
    )


def _data(run: RunConfig) -> str:
    try:
        manifests = [Manifest.load(folder) for folder in run.data.folders]
    except DataError as error:
        return f"not usable yet: {error}\n"
    weights = run.data.weights or [max(1, manifest.num_tokens) for manifest in manifests]
    slots = slot_counts(weights, run.data.folders)
    rows = zip(run.data.folders, manifests, slots, strict=True)
    return "".join(_dataset_line(run, folder, manifest, slots / PATTERN_SLOTS) for folder, manifest, slots in rows)


def _dataset_line(run: RunConfig, folder: Path, manifest: Manifest, share: float) -> str:
    of_a_blend = f"{share:.2%} of the windows; " if share < 1 else ""
    tokens = share * run.train.steps * run.train.global_batch * run.train.seq_len_tokens
    return (
        f"{folder}: {of_a_blend}{manifest.num_tokens:,} tokens in {manifest.num_documents:,} documents, "
        f"segments {manifest.rule.spec}; the run reads it {tokens / max(1, manifest.num_tokens):.2f} times\n"
    )
