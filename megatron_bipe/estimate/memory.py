"""What one rank of a layout will hold, in bytes; nothing is allocated to find out.

Weights, gradients and optimizer state are counted exactly, from the layers as this layout builds them. Activations are
what autograd keeps on the CPU (a test compares). Not counted: buffers of kernels and of communication, fragmentation,
what the framework itself needs.

Source of the ZeRO divisions: Rajbhandari et al. 2020 (arXiv 1910.02054).
"""

import itertools
from typing import Any, NamedTuple

from megatron_bipe.config.deepspeed import offloads, zero_stage
from megatron_bipe.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_bipe.config.validate import accumulation_steps
from megatron_bipe.model.positions.make import relative_class
from megatron_bipe.parallel.pipeline_partition import cut_stages, layer_costs
from megatron_bipe.parallel.tensor_parallel import parameters_of_rank

FP32_BYTES = 4


class StageMemory(NamedTuple):
    """One rank of a stage; bytes unless said otherwise."""

    stage: int
    first_layer: int
    last_layer: int
    parameters: int  # that the rank computes with
    cost_share: float  # of all multiplications
    weights: float
    gradients: float
    optimizer: float  # fp32 weights where the compute weights are others, Adam's two means
    activations: float
    logits: float
    host: float  # offloaded to the CPU's memory

    @property
    def device(self) -> float:
        """All that is on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def stage_memories(run: RunConfig, ds_config: dict[str, Any], num_ranks: int) -> list[StageMemory]:
    """Memory of a rank of each stage.

    Args:
        run: the run configuration, validated for `num_ranks`.
        ds_config: the DeepSpeed configuration.
        num_ranks: of the launch.
    """
    parallel, model = run.parallel, run.model
    bounds = cut_stages(model, run.train.seq_len_tokens, parallel.pipeline)
    counts = parameters_of_rank(model, parallel.tensor)
    costs = layer_costs(model, run.train.seq_len_tokens)
    stages = []
    for stage, (start, stop) in enumerate(itertools.pairwise(bounds)):
        here = counts[start:stop]
        if model.tied_output and parallel.pipeline > 1 and stage == parallel.pipeline - 1:
            here = [*here, model.vocab_size * model.hidden_size // parallel.tensor]  # its copy of the table
        state, host = _state_bytes(sum(here), max(here), run, ds_config, num_ranks)
        blocks = len(range(max(start, 1), min(stop, model.num_layers + 1)))
        kept = blocks * _kept_a_block(run) + (_kept_tables(run) if blocks else 0)
        stages.append(
            StageMemory(
                stage,
                start,
                stop - 1,
                sum(here),
                sum(costs[start:stop]) / sum(costs),
                *state,
                _micro_batches_kept(run, stage, num_ranks) * kept + _recomputed(run),
                logits_bytes(run) if stage == parallel.pipeline - 1 else 0.0,
                host,
            )
        )
    return stages


def table_bytes_per_token(model: ModelConfig, parallel: ParallelConfig, width: int, seq_len_tokens: int) -> float:
    """What the blocks of a stage keep together of a micro-batch's positions; arguments as `block_bytes_per_token`."""
    relative = relative_class(model)
    buckets = 8 * seq_len_tokens if relative.biases_scores else 0
    return (relative.table_width(model.head_width) * width + buckets) * parallel.context


def block_bytes_per_token(
    model: ModelConfig, parallel: ParallelConfig, width: int, recompute: str, seq_len_tokens: int
) -> float:
    """What a block keeps for backward, on one rank, for each token of its micro-batch that the rank has.

    Args:
        model: its shape.
        parallel: its layout.
        width: bytes of a number in compute precision.
        recompute: as `ParallelConfig.recompute` has it.
        seq_len_tokens: of a window; matters to encodings that materialise scores.
    """
    between = 1 / (parallel.tensor if parallel.sequence else 1)  # share of the positions between split layers
    stream = model.hidden_size * between
    input_ids = 8 * parallel.context  # of whole windows
    if recompute == "full":
        return stream * width + input_ids
    split = parallel.tensor
    queries, keys = model.num_heads * model.head_width / split, model.kv_heads * model.head_width / split
    ffn, head_sums = model.ffn_size / split, model.num_heads / split * FP32_BYTES
    relative = relative_class(model)
    channels = relative.widening(model.head_width)
    scores = seq_len_tokens * head_sums if relative.biases_scores else 0  # in fp32
    biased = 1 + channels / model.head_width  # queries, keys, values and output are wider
    attention_output = queries * biased * width + head_sums
    if recompute == "selective":  # inputs, products of matrices, attention, what came from other ranks
        products = queries + 2 * keys + 2 * ffn + 2 * model.hidden_size
        received = 2 * stream + (2 * model.hidden_size if parallel.sequence else 0) if parallel.tensor > 1 else 0
        received += 2 * queries + 2 * keys if parallel.context > 1 else 0
        return (stream + products + received) * width + attention_output + scores + input_ids
    norms = 2 * (stream * width + between * FP32_BYTES)  # their inputs, and a number a token
    gathered = 2 * model.hidden_size * width  # inputs of the split matrices, whole
    encoded = (queries + keys) * biased if relative.encodes else 0
    with_layout = queries if relative.encodes or parallel.context > 1 else 0  # the output, tokens before heads
    values = keys * biased if channels else queries + 2 * keys  # a view of the whole projection
    mlp = 3 * ffn
    mask = seq_len_tokens * parallel.context if relative.biases_scores else 0
    return norms + gathered + (encoded + values + with_layout + mlp) * width + attention_output + scores + mask


def logits_bytes(run: RunConfig) -> float:
    """The logits of a micro-batch in compute precision; their gradient takes their place."""
    return tokens_here(run) * run.model.vocab_size / run.parallel.tensor * compute_width(run)


def tokens_here(run: RunConfig) -> float:
    """Of a micro-batch, those that a rank has."""
    return run.train.micro_batch * run.train.seq_len_tokens / run.parallel.context


def compute_width(run: RunConfig) -> int:
    """Bytes of a number in compute precision."""
    return {"bf16": 2, "fp32": FP32_BYTES}[run.train.precision]


def _kept_a_block(run: RunConfig) -> float:
    return _block_bytes(run, run.parallel.recompute)


def _recomputed(run: RunConfig) -> float:
    """Of the one block that backward is at."""
    return 0.0 if run.parallel.recompute == "none" else _block_bytes(run, "none")


def _block_bytes(run: RunConfig, recompute: str) -> float:
    seq_len_tokens = run.train.seq_len_tokens
    a_token = block_bytes_per_token(run.model, run.parallel, compute_width(run), recompute, seq_len_tokens)
    return tokens_here(run) * a_token


def _kept_tables(run: RunConfig) -> float:
    seq_len_tokens = run.train.seq_len_tokens
    return tokens_here(run) * table_bytes_per_token(run.model, run.parallel, compute_width(run), seq_len_tokens)


def _micro_batches_kept(run: RunConfig, stage: int, num_ranks: int) -> int:
    """Forward passes that a stage has done and not yet gone back through, at most: one for each stage from it on."""
    under_way = run.parallel.pipeline - stage
    return min(under_way, accumulation_steps(run.train, run.parallel.data_ranks(num_ranks)))


def _state_bytes(
    parameters: int, largest_layer: int, run: RunConfig, ds_config: dict[str, Any], num_ranks: int
) -> tuple[tuple[float, float, float], float]:
    """(weights, gradients, optimizer) on the device, and what is offloaded.

    With ZeRO 3, the weights of two layers are there whole: the one at work, and one fetched ahead.
    """
    zero, width = zero_stage(ds_config), compute_width(run)
    replicas = run.parallel.replica_ranks(num_ranks)
    part = {stage: parameters / replicas if zero >= stage else parameters for stage in (1, 2, 3)}
    has_masters = width < FP32_BYTES or zero > 0
    fetched = 2 * largest_layer * width if zero == 3 else 0
    weights = part[3] * width
    gradients = part[2] * (width if zero == 0 else FP32_BYTES)
    optimizer = part[1] * (3 if has_masters else 2) * FP32_BYTES
    optimizer_on_host, weights_on_host = offloads(ds_config)
    host = 0.0
    if optimizer_on_host:  # gradients are summed there, too
        host, gradients, optimizer = gradients + optimizer, 0.0, 0.0
    if weights_on_host:
        host, weights = host + weights, 0.0
    return (weights + fetched, gradients, optimizer), host
