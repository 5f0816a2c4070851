"""What the ranks of a layout say to each other in one step: how often, and how many bytes each sends.

A ring is assumed: of n bytes that R ranks sum and share, each rank sends 2 n (R - 1) / R; a gather or a scatter of n
bytes in all takes half of that, and of n bytes that a rank deals out to all, it keeps n / R. Sent means sent by the
rank of the stage that sends most; what overlaps with computation is counted in full.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_bipe.config.deepspeed import zero_stage
from megatron_bipe.config.schema import RunConfig
from megatron_bipe.config.validate import accumulation_steps
from megatron_bipe.estimate.memory import FP32_BYTES, compute_width, tokens_here
from megatron_bipe.parallel.pipeline_partition import cut_stages, layer_costs
from megatron_bipe.parallel.tensor_parallel import parameters_of_rank

# By `communication_data_type`; without one DeepSpeed exchanges gradients in compute precision.
_EXCHANGED_BYTES = {"fp32": FP32_BYTES, "bf16": 2, "fp16": 2}


class Traffic(NamedTuple):
    """One kind of message of a rank."""

    axis: str  # tensor, context, pipeline or data
    what: str
    times: int  # a step
    bytes_sent: float  # a step


def step_traffic(run: RunConfig, ds_config: dict[str, Any], num_ranks: int) -> list[Traffic]:
    """All that a rank sends in one optimizer step, by axis; `ds_config` is what the engine is started with."""
    micro_batches = accumulation_steps(run.train, run.parallel.data_ranks(num_ranks))
    return [
        *_tensor(run, micro_batches),
        *_context(run, micro_batches),
        *_pipeline(run, micro_batches),
        *_data(run, ds_config, num_ranks, micro_batches),
    ]


def bubble(run: RunConfig, num_ranks: int) -> float:
    """Share of a step in which the average stage waits for others, communication not counted.

    m micro-batches through p stages take as long as m + p - 1 turns of the most costly stage would.
    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2, for stages of equal cost.
    """
    costs = layer_costs(run.model, run.train.seq_len_tokens)
    bounds = cut_stages(run.model, run.train.seq_len_tokens, run.parallel.pipeline)
    stages = [sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds)]
    micro_batches = accumulation_steps(run.train, run.parallel.data_ranks(num_ranks))
    turns = micro_batches + len(stages) - 1
    return 1 - micro_batches * sum(stages) / (turns * max(stages) * len(stages))


def _tensor(run: RunConfig, micro_batches: int) -> Iterator[Traffic]:
    """Of the stage with most blocks, the embedding and the head counted with it where there is one stage."""
    parallel = run.parallel
    if parallel.tensor == 1:
        return
    sums = 2 * _passes(run) * _most_blocks(run) * micro_batches
    if parallel.pipeline == 1:
        sums += 2 * micro_batches
    full = tokens_here(run) * run.model.hidden_size * compute_width(run)
    ring = (parallel.tensor - 1) / parallel.tensor
    if parallel.sequence:
        yield Traffic("tensor", "gathers", sums, sums * full * ring)
        yield Traffic("tensor", "reduce-scatters", sums, sums * full * ring)
    else:
        yield Traffic("tensor", "all-reduces", sums, sums * full * 2 * ring)


def _context(run: RunConfig, micro_batches: int) -> Iterator[Traffic]:
    """Of the stage with most blocks: each keeps a part of what it has, and sends the others theirs."""
    parallel, model = run.parallel, run.model
    if parallel.context == 1:
        return
    times = _passes(run) * _most_blocks(run) * micro_batches
    sent = tokens_here(run) * model.head_width / parallel.tensor * (parallel.context - 1) / parallel.context
    sent *= times * compute_width(run)
    yield Traffic("context", "queries, keys, values", times, sent * (model.num_heads + 2 * model.kv_heads))
    yield Traffic("context", "attention output", times, sent * model.num_heads)


def _passes(run: RunConfig) -> int:
    """Forward, backward, and forward once more where all is computed again."""
    return 3 if run.parallel.recompute == "full" else 2


def _most_blocks(run: RunConfig) -> int:
    bounds = cut_stages(run.model, run.train.seq_len_tokens, run.parallel.pipeline)
    return max(min(stop, run.model.num_layers + 1) - max(start, 1) for start, stop in itertools.pairwise(bounds))


def _pipeline(run: RunConfig, micro_batches: int) -> Iterator[Traffic]:
    """Of a stage that has one on either side; DeepSpeed cuts what tensor-parallel ranks hold alike, and gathers it."""
    parallel = run.parallel
    if parallel.pipeline == 1:
        return
    hidden = tokens_here(run) * run.model.hidden_size * compute_width(run) / parallel.tensor
    yield Traffic("pipeline", "hidden states", micro_batches, micro_batches * hidden)
    yield Traffic("pipeline", "position ids", micro_batches, micro_batches * tokens_here(run) * parallel.context * 8)
    if parallel.pipeline > 2:
        yield Traffic("pipeline", "their gradients", micro_batches, micro_batches * hidden)


def _data(run: RunConfig, ds_config: dict[str, Any], num_ranks: int, micro_batches: int) -> Iterator[Traffic]:
    """Gradients are summed once a step, with ZeRO 2 and 3 once a micro-batch."""
    replicas, zero = run.parallel.replica_ranks(num_ranks), zero_stage(ds_config)
    if replicas == 1:
        return
    bounds = cut_stages(run.model, run.train.seq_len_tokens, run.parallel.pipeline)
    counts = parameters_of_rank(run.model, run.parallel.tensor)
    most = max(sum(counts[start:stop]) for start, stop in itertools.pairwise(bounds))
    weights, ring = most * compute_width(run), (replicas - 1) / replicas
    gradients = most * _EXCHANGED_BYTES.get(ds_config.get("communication_data_type", ""), compute_width(run))
    if zero < 2:
        yield Traffic("data", "gradients, all-reduced", 1, 2 * gradients * ring)
    else:
        yield Traffic("data", "gradients, reduced", micro_batches, micro_batches * gradients * ring)
    if zero in (1, 2):
        yield Traffic("data", "weights, gathered", 1, weights * ring)
    if zero == 3:
        yield Traffic("data", "weights, gathered", 2 * micro_batches, 2 * micro_batches * weights * ring)
