"""What the ranks of a layout say to each other in one step: how often, and how many bytes each sends.

A ring is assumed: of n bytes that R ranks sum and share, each rank sends 2 n (R - 1) / R; a gather or a scatter of n
bytes in all takes half of that. Sent means sent by the rank of the stage that sends most; what overlaps with
computation is counted in full.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_bipe.config.deepspeed import zero_stage
from megatron_bipe.config.schema import RunConfig
from megatron_bipe.config.validate import accumulation_steps
from megatron_bipe.parallel.stages import cut_stages, layer_costs
from megatron_bipe.parallel.tensor import parameters_of_rank
from megatron_bipe.train.memory import compute_width


class Traffic(NamedTuple):
    """One kind of message of a rank."""

    axis: str  # tensor, pipeline or data
    what: str
    times: int  # a step
    bytes_sent: float  # a step


def step_traffic(run: RunConfig, ds_config: dict[str, Any], num_ranks: int) -> list[Traffic]:
    """All that a rank sends in one optimizer step, by axis."""
    micro_batches = accumulation_steps(run.train, run.parallel.data_ranks(num_ranks))
    return [
        *_tensor(run, micro_batches),
        *_pipeline(run, micro_batches),
        *_data(run, zero_stage(ds_config), num_ranks, micro_batches),
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
    bounds = cut_stages(run.model, run.train.seq_len_tokens, parallel.pipeline)
    blocks = [min(stop, run.model.num_layers + 1) - max(start, 1) for start, stop in itertools.pairwise(bounds)]
    sums = 4 * max(blocks) * micro_batches
    if parallel.recompute == "full":
        sums += 2 * max(blocks) * micro_batches  # forward once more
    if parallel.pipeline == 1:
        sums += 2 * micro_batches
    whole = _tokens(run) * run.model.hidden_size * compute_width(run)
    ring = (parallel.tensor - 1) / parallel.tensor
    if parallel.sequence:
        yield Traffic("tensor", "gathers", sums, sums * whole * ring)
        yield Traffic("tensor", "reduce-scatters", sums, sums * whole * ring)
    else:
        yield Traffic("tensor", "all-reduces", sums, sums * whole * 2 * ring)


def _pipeline(run: RunConfig, micro_batches: int) -> Iterator[Traffic]:
    """Of a stage that has one on either side; DeepSpeed cuts what tensor-parallel ranks hold alike, and gathers it."""
    if run.parallel.pipeline == 1:
        return
    hidden = _tokens(run) * run.model.hidden_size * compute_width(run) / run.parallel.tensor
    yield Traffic("pipeline", "hidden states", micro_batches, micro_batches * hidden)
    yield Traffic("pipeline", "position ids", micro_batches, micro_batches * _tokens(run) * 8)
    if run.parallel.pipeline > 2:
        yield Traffic("pipeline", "their gradients", micro_batches, micro_batches * hidden)


def _data(run: RunConfig, zero: int, num_ranks: int, micro_batches: int) -> Iterator[Traffic]:
    """DeepSpeed sums gradients in compute precision: once a step, with ZeRO 2 and 3 once a micro-batch."""
    copies = num_ranks // (run.parallel.tensor * run.parallel.pipeline)
    if copies == 1:
        return
    bounds = cut_stages(run.model, run.train.seq_len_tokens, run.parallel.pipeline)
    counts = parameters_of_rank(run.model, run.parallel.tensor)
    most = max(sum(counts[start:stop]) for start, stop in itertools.pairwise(bounds))
    whole, ring = most * compute_width(run), (copies - 1) / copies
    if zero < 2:
        yield Traffic("data", "gradients, all-reduced", 1, 2 * whole * ring)
    else:
        yield Traffic("data", "gradients, reduced", micro_batches, micro_batches * whole * ring)
    if zero in (1, 2):
        yield Traffic("data", "weights, gathered", 1, whole * ring)
    if zero == 3:
        yield Traffic("data", "weights, gathered", 2 * micro_batches, 2 * micro_batches * whole * ring)


def _tokens(run: RunConfig) -> int:
    return run.train.micro_batch * run.train.seq_len_tokens
