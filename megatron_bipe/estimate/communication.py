"""Estimated communication of one optimizer step: the number of messages and the bytes that a rank sends.

Ring algorithms are assumed. For n bytes on R ranks, a rank sends 2 n (R - 1) / R in an all-reduce, and half of that in
an all-gather or a reduce-scatter; in an all-to-all it sends all but 1 / R of its bytes. Figures are those of the stage
that sends most; communication that overlaps with computation is counted in full.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_bipe.config import RunConfig, accumulation_steps, zero_stage
from megatron_bipe.estimate.memory import FP32_BYTES, compute_width, layer_parameters, stage_bounds, tokens_here
from megatron_bipe.parallel import layer_costs

# Bytes by `communication_data_type`; if it is not set, DeepSpeed exchanges gradients in compute precision.
_EXCHANGED_BYTES = {"fp32": FP32_BYTES, "bf16": 2, "fp16": 2}


class Traffic(NamedTuple):
    """One kind of communication of a rank."""

    axis: str  # tensor, context, pipeline or data
    what: str
    times: int  # per step
    bytes_sent: float  # per step
    is_update: bool = False  # after the last micro-batch, where no computation hides it


def step_traffic(run: RunConfig, ds_config: dict[str, Any], num_ranks: int) -> list[Traffic]:
    """Return what a rank sends in one optimizer step, by axis.

    Args:
        run: the run configuration, validated for `num_ranks`.
        ds_config: result of `config.deepspeed.engine_config`.
        num_ranks: ranks of the launch.
    """
    micro_batches = accumulation_steps(run.train, run.parallel.data_ranks(num_ranks))
    return [
        *_tensor(run, micro_batches),
        *_context(run, micro_batches),
        *_pipeline(run, micro_batches),
        *_data(run, ds_config, num_ranks),
    ]


def bubble(run: RunConfig, num_ranks: int) -> float:
    """Return the fraction of a step that the average pipeline stage is idle, communication not counted.

    With p stages, m micro-batches take m + p - 1 times as long as one micro-batch on the most expensive stage.
    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2, for stages of equal cost.
    """
    costs = layer_costs(run.model, run.train.seq_len_tokens)
    bounds = stage_bounds(run.model, run.train.seq_len_tokens, run.parallel.pipeline)
    stages = [sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds)]
    micro_batches = accumulation_steps(run.train, run.parallel.data_ranks(num_ranks))
    slots = micro_batches + len(stages) - 1
    return 1 - micro_batches * sum(stages) / (slots * max(stages) * len(stages))


def _tensor(run: RunConfig, micro_batches: int) -> Iterator[Traffic]:
    """Count the collectives of the stage with the most blocks, and of embedding and head if it is the only one."""
    parallel = run.parallel
    if parallel.tensor == 1:
        return
    num_calls = 2 * _passes(run) * _most_blocks(run) * micro_batches
    if parallel.pipeline == 1:
        num_calls += 2 * micro_batches
    full_bytes = tokens_here(run) * run.model.hidden_size * compute_width(run)
    ring = (parallel.tensor - 1) / parallel.tensor
    if parallel.sequence:
        yield Traffic("tensor", "gathers", num_calls, num_calls * full_bytes * ring)
        yield Traffic("tensor", "reduce-scatters", num_calls, num_calls * full_bytes * ring)
    else:
        yield Traffic("tensor", "all-reduces", num_calls, num_calls * full_bytes * 2 * ring)
    model = run.model
    if model.kv_heads % parallel.tensor:
        num_gathers = _passes(run) * _most_blocks(run) * micro_batches
        qkv_bytes = tokens_here(run) * (model.num_heads + 2 * model.kv_heads) * model.head_width * compute_width(run)
        yield Traffic("tensor", "queries, keys, values", num_gathers, num_gathers * qkv_bytes * ring)


def _context(run: RunConfig, micro_batches: int) -> Iterator[Traffic]:
    """Count the all-to-alls of the stage with the most blocks: a rank keeps its own slice and sends the rest."""
    parallel, model = run.parallel, run.model
    if parallel.context == 1:
        return
    times = _passes(run) * _most_blocks(run) * micro_batches
    sent = tokens_here(run) * model.head_width / parallel.tensor * (parallel.context - 1) / parallel.context
    sent *= times * compute_width(run)
    kv_heads = max(model.kv_heads, parallel.tensor * parallel.context)  # replicas included
    yield Traffic("context", "queries, keys, values", times, sent * (model.num_heads + 2 * kv_heads))
    yield Traffic("context", "attention output", times, sent * model.num_heads)


def _passes(run: RunConfig) -> int:
    """Return the number of passes: forward, backward, and a second forward pass with full recomputation."""
    return 3 if run.parallel.recompute == "full" else 2


def _most_blocks(run: RunConfig) -> int:
    bounds = stage_bounds(run.model, run.train.seq_len_tokens, run.parallel.pipeline)
    return max(min(stop, run.model.num_layers + 1) - max(start, 1) for start, stop in itertools.pairwise(bounds))


def _pipeline(run: RunConfig, micro_batches: int) -> Iterator[Traffic]:
    """Count the messages of a stage with neighbours on both sides.

    DeepSpeed partitions the activations that tensor-parallel ranks replicate, and gathers them at the receiver.
    """
    parallel = run.parallel
    if parallel.pipeline == 1:
        return
    hidden = tokens_here(run) * run.model.hidden_size * compute_width(run) / parallel.tensor
    yield Traffic("pipeline", "hidden states", micro_batches, micro_batches * hidden)
    yield Traffic("pipeline", "position ids", micro_batches, micro_batches * tokens_here(run) * parallel.context * 8)
    if parallel.pipeline > 2:
        yield Traffic("pipeline", "their gradients", micro_batches, micro_batches * hidden)


def _data(run: RunConfig, ds_config: dict[str, Any], num_ranks: int) -> Iterator[Traffic]:
    """Count gradient sums, once per step (ZeRO 2 and 3: once per micro-batch), and weight gathers."""
    replicas, zero = run.parallel.replica_ranks(num_ranks), zero_stage(ds_config)
    if replicas == 1:
        return
    micro_batches = accumulation_steps(run.train, run.parallel.data_ranks(num_ranks))
    most_parameters = parameters_of_largest_stage(run)
    weights, ring = most_parameters * compute_width(run), (replicas - 1) / replicas
    gradients = most_parameters * _EXCHANGED_BYTES.get(ds_config.get("communication_data_type", ""), compute_width(run))
    times = 1 if zero < 2 else micro_batches
    if _reduces_to_owner(run, ds_config):
        yield Traffic("data", "gradients, reduced", times, times * gradients * ring, is_update=zero < 2)
    else:
        yield Traffic("data", "gradients, all-reduced", times, times * 2 * gradients * ring, is_update=zero < 2)
    if zero in (1, 2):
        yield Traffic("data", "weights, gathered", 1, weights * ring, is_update=True)
    if zero == 3:
        yield Traffic("data", "weights, gathered", 2 * micro_batches, 2 * micro_batches * weights * ring)


def parameters_of_largest_stage(run: RunConfig) -> int:
    """Return the number of parameters of a rank of the stage that has most."""
    bounds = stage_bounds(run.model, run.train.seq_len_tokens, run.parallel.pipeline)
    counts = layer_parameters(run.model, run.parallel.tensor)
    return max(sum(counts[start:stop]) for start, stop in itertools.pairwise(bounds))


def _reduces_to_owner(run: RunConfig, ds_config: dict[str, Any]) -> bool:
    """Return True if each rank receives the sums of its own shard alone, which is half an all-reduce.

    By default DeepSpeed's ZeRO 2 sums every bucket on all ranks, because a bucket holds parts of several ranks.
    Source: DeepSpeed 0.19, runtime/zero/stage_1_and_2.py (average_tensor) and stage3.py.
    """
    zero, settings = zero_stage(ds_config), ds_config.get("zero_optimization", {})
    if zero == 1 and run.train.precision == "bf16":  # engine/gradients.py
        return True
    reduces = zero > 0 and settings.get("reduce_scatter", True)
    return bool(reduces and (zero == 3 or not settings.get("use_multi_rank_bucket_allreduce", True)))
