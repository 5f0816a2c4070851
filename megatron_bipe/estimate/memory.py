"""Estimated memory of one rank of each pipeline stage, in bytes; nothing is allocated.

Weights, gradients and optimizer state are exact counts of the layers that this layout builds. Activations are what
autograd saves on the CPU for eager blocks (a test compares); torch decides what compiled blocks save. Not counted for a
CPU: buffers of kernels and communication, fragmentation, and the framework's own memory. For a GPU `gpu_bytes`
estimates them with constants that are assumed, not measured.

Source of the ZeRO divisions: Rajbhandari et al. 2020 (arXiv 1910.02054).
"""

import functools
import itertools
from typing import Any, NamedTuple

from megatron_bipe.config import (
    ModelConfig,
    ParallelConfig,
    RunConfig,
    accumulation_steps,
    offloads,
    zero_stage,
)
from megatron_bipe.model.positions.base import relative_class
from megatron_bipe.parallel import layer_costs, parameters_of_rank, partition_layers
from megatron_bipe.runtime.hardware import choose_compile

FP32_BYTES = 4
STATE_BYTES = 3 * FP32_BYTES  # of a parameter in a checkpoint: fp32 weight and Adam's two moments

# What a GPU needs besides tensors; assumed.
_CONTEXT_BYTES = 1.5 * 2**30  # CUDA context, workspaces of cuBLAS and cuDNN: between 1 and 2 GiB
_COMMUNICATOR_BYTES = 0.5 * 2**30  # an NCCL communicator: between 0.3 and 1 GiB
_FRAGMENTATION = 0.05  # fraction of the tensors' memory that the allocator cannot use
_LOSS_PARTS, _LOSS_PART_ELEMENTS = 3, 2**26  # fp32 parts of logits that the eager loss has at a time (model/loss.py)


# Thousands of layouts have the same stages.
stage_bounds = functools.cache(partition_layers)


@functools.cache
def layer_parameters(model: ModelConfig, tensor: int) -> list[int]:
    """Return the number of parameters of each layer on one of `tensor` tensor-parallel ranks."""
    embedding, block, head = parameters_of_rank(model.model_copy(update={"num_layers": 1}), tensor)
    return [embedding, *[block] * model.num_layers, head]


class StageMemory(NamedTuple):
    """Estimated memory of one rank of a stage, in bytes."""

    stage: int
    first_layer: int
    last_layer: int
    parameters: int  # number that this rank computes with
    cost_share: float  # fraction of all multiplications
    weights: float
    gradients: float
    optimizer: float  # fp32 master weights, if there are any, and Adam's two moments
    activations: float
    logits: float
    host: float  # offloaded to host memory
    checkpoint_copy: float  # in host memory, from which asynchronous checkpoints are written
    gpu: float = 0.0  # what a GPU needs besides; 0 for a CPU

    @property
    def device(self) -> float:
        return self.tensors + self.gpu

    @property
    def tensors(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def stage_memories(
    run: RunConfig, ds_config: dict[str, Any], num_ranks: int, *, on_gpu: bool = False
) -> list[StageMemory]:
    """Return the estimated memory of a rank of each stage.

    Args:
        run: the run configuration, validated for `num_ranks`.
        ds_config: result of `config.deepspeed.engine_config`.
        num_ranks: ranks of the launch.
        on_gpu: True adds what a GPU needs besides tensors.
    """
    parallel, model = run.parallel, run.model
    bounds = stage_bounds(model, run.train.seq_len_tokens, parallel.pipeline)
    counts = layer_parameters(model, parallel.tensor)
    costs = layer_costs(model, run.train.seq_len_tokens)
    stages = []
    for stage, (start, stop) in enumerate(itertools.pairwise(bounds)):
        stage_layers = counts[start:stop]
        if model.tied_output and parallel.pipeline > 1 and stage == parallel.pipeline - 1:
            embedding = model.vocab_size * model.hidden_size // parallel.tensor
            stage_layers = [*stage_layers, embedding]  # the replica on the last stage
        state, host = _state_bytes(sum(stage_layers), max(stage_layers), run, ds_config, num_ranks)
        blocks = len(range(max(start, 1), min(stop, model.num_layers + 1)))
        saved = blocks * _saved_per_block(run) + (_saved_tables(run) if blocks else 0)
        found = StageMemory(
            stage,
            start,
            stop - 1,
            sum(stage_layers),
            sum(costs[start:stop]) / sum(costs),
            *state,
            _micro_batches_in_flight(run, stage, num_ranks) * saved + _recomputed(run),
            logits_bytes(run) if stage == parallel.pipeline - 1 else 0.0,
            host,
            _checkpoint_copy(sum(stage_layers), run, num_ranks),
        )
        stages.append(found._replace(gpu=gpu_bytes(found, run, ds_config, num_ranks)) if on_gpu else found)
    return stages


def gpu_bytes(stage: StageMemory, run: RunConfig, ds_config: dict[str, Any], num_ranks: int) -> float:
    """Return what a GPU needs besides tensors: context, communicators, buffers, parts of the loss, fragmentation."""
    zero = zero_stage(ds_config)
    buckets = _bucket_bytes(ds_config, compute_width(run))
    loss_parts = 0.0
    if stage.logits and not choose_compile(run, zero, on_gpu=True).compiles:
        elements = stage.logits / compute_width(run)
        loss_parts = _LOSS_PARTS * min(elements, _LOSS_PART_ELEMENTS) * FP32_BYTES
    return outside_bytes(stage, run, num_ranks) + buckets + loss_parts


def outside_bytes(stage: StageMemory, run: RunConfig, num_ranks: int) -> float:
    """Return what a GPU needs besides the memory that torch reports as allocated."""
    parallel = run.parallel
    sizes = (num_ranks, parallel.replica_ranks(num_ranks), parallel.tensor, parallel.context, parallel.pipeline)
    communicators = sum(size > 1 for size in sizes)
    return _CONTEXT_BYTES + communicators * _COMMUNICATOR_BYTES + _FRAGMENTATION * stage.tensors


def _bucket_bytes(ds_config: dict[str, Any], width: int) -> float:
    """Return the bytes of contiguous gradient buckets; ZeRO 1 has them in fp32 only, as its bf16 optimizer is another.

    Source: DeepSpeed 0.19, runtime/zero/stage_1_and_2.py (setup_buckets) and stage3.py (_setup_for_real_optimizer).
    """
    stage, settings = zero_stage(ds_config), ds_config.get("zero_optimization", {})
    has_buckets = stage > 1 or (stage == 1 and width == FP32_BYTES)
    if not has_buckets or not settings.get("contiguous_gradients", True):
        return 0.0
    count = 2 if stage < 3 and settings.get("overlap_comm") else 1
    return count * float(settings.get("reduce_bucket_size", 5e8)) * width


def _checkpoint_copy(parameters: int, run: RunConfig, num_ranks: int) -> float:
    """Return the bytes of the state that a rank copies to host memory for a checkpoint; replicas share the work."""
    return parameters * STATE_BYTES / run.parallel.replica_ranks(num_ranks) if run.checkpoint.asynchronous else 0.0


def table_bytes_per_token(model: ModelConfig, parallel: ParallelConfig, width: int, seq_len_tokens: int) -> float:
    """Return the bytes per token of tables that all blocks of a stage share; arguments: see `block_bytes_per_token`."""
    relative = relative_class(model)
    num_heads = model.num_heads / (parallel.tensor * parallel.context)
    buckets_and_mask = (8 + 1) * seq_len_tokens if relative.biases_scores else 0
    query_scale = width if model.log_scale else 0
    prepared = relative.prepared_width(model.head_width, num_heads) * width
    return (prepared + query_scale + buckets_and_mask) * parallel.context


def block_bytes_per_token(
    model: ModelConfig, parallel: ParallelConfig, width: int, recompute: str, seq_len_tokens: int
) -> float:
    """Return the bytes that a block saves for backward on one rank, per token of a micro-batch on that rank.

    Args:
        model: shape of the model.
        parallel: layout of the run.
        width: bytes per number in compute precision.
        recompute: value of `ParallelConfig.recompute`.
        seq_len_tokens: sequence length; matters to encodings that materialise scores.
    """
    between = 1 / (parallel.tensor if parallel.sequence else 1)  # fraction of positions between split layers
    stream = model.hidden_size * between
    input_ids = 8 * parallel.context  # of unsharded sequences
    if recompute == "full":
        return stream * width + input_ids
    split = parallel.tensor
    kv_heads = max(model.kv_heads, split * parallel.context)  # replicas included
    queries, keys = model.num_heads * model.head_width / split, kv_heads * model.head_width / split
    ffn, head_sums = model.ffn_size / split, model.num_heads / split * FP32_BYTES
    relative = relative_class(model)
    channels = relative.num_extra_channels(model.head_width)
    scores = seq_len_tokens * head_sums if relative.biases_scores else 0  # in fp32
    biased = 1 + channels / model.head_width  # queries, keys, values and output are wider
    attention_output = queries * biased * width + head_sums
    if recompute == "selective":  # saves inputs, matrix products, attention, and received tensors
        projection = (model.num_heads + 2 * model.kv_heads) * model.head_width
        products = projection / split + 2 * ffn + 2 * model.hidden_size
        received = 2 * stream + (2 * model.hidden_size if parallel.sequence else 0) if parallel.tensor > 1 else 0
        received += 2 * queries + 2 * keys if parallel.context > 1 else 0
        received += projection if model.kv_heads % split else 0
        return (stream + products + received) * width + attention_output + scores + input_ids
    norms = 2 * (stream * width + between * FP32_BYTES)  # inputs, and one fp32 number per token
    gathered = 2 * model.hidden_size * width  # unsharded inputs of the split matrices
    encoded = (queries + keys) * biased if relative.encodes else 0
    transposed = queries if relative.encodes or parallel.context > 1 else 0  # attention output in [B, T, N, H]
    values = keys * biased if channels else queries + 2 * keys  # else a view of the full QKV projection
    mlp = 3 * ffn
    return norms + gathered + (encoded + values + transposed + mlp) * width + attention_output + scores


def logits_bytes(run: RunConfig) -> float:
    """Return the bytes of the logits of a micro-batch; their gradient reuses this memory."""
    return tokens_here(run) * run.model.vocab_size / run.parallel.tensor * compute_width(run)


def tokens_here(run: RunConfig) -> float:
    """Return the number of tokens of a micro-batch on one rank."""
    return run.train.micro_batch * run.train.seq_len_tokens / run.parallel.context


def compute_width(run: RunConfig) -> int:
    """Return the bytes per number in compute precision."""
    return {"bf16": 2, "fp32": FP32_BYTES}[run.train.precision]


def _saved_per_block(run: RunConfig) -> float:
    return _block_bytes(run, run.parallel.recompute)


def _recomputed(run: RunConfig) -> float:
    """Return the bytes of the one block that backward recomputes at a time."""
    return 0.0 if run.parallel.recompute == "none" else _block_bytes(run, "none")


def _block_bytes(run: RunConfig, recompute: str) -> float:
    seq_len_tokens = run.train.seq_len_tokens
    bytes_per_token = block_bytes_per_token(run.model, run.parallel, compute_width(run), recompute, seq_len_tokens)
    return tokens_here(run) * bytes_per_token


def _saved_tables(run: RunConfig) -> float:
    seq_len_tokens = run.train.seq_len_tokens
    return tokens_here(run) * table_bytes_per_token(run.model, run.parallel, compute_width(run), seq_len_tokens)


def _micro_batches_in_flight(run: RunConfig, stage: int, num_ranks: int) -> int:
    """Return the largest number of micro-batches in flight: one for this stage and one for each stage after it."""
    in_flight = run.parallel.pipeline - stage
    return min(in_flight, accumulation_steps(run.train, run.parallel.data_ranks(num_ranks)))


def _state_bytes(
    parameters: int, largest_layer: int, run: RunConfig, ds_config: dict[str, Any], num_ranks: int
) -> tuple[tuple[float, float, float], float]:
    """Return the bytes of (weights, gradients, optimizer) on the device, and the offloaded bytes.

    With ZeRO 3, the weights of two layers are unsharded at a time: the current one and a prefetched one.
    """
    zero, width = zero_stage(ds_config), compute_width(run)
    replicas = run.parallel.replica_ranks(num_ranks)
    per_rank = {stage: parameters / replicas if zero >= stage else parameters for stage in (1, 2, 3)}
    has_masters = width < FP32_BYTES or zero > 0
    fetched = 2 * largest_layer * width if zero == 3 else 0
    weights = per_rank[3] * width
    gradients = per_rank[2] * (width if zero == 0 else FP32_BYTES)
    optimizer = per_rank[1] * (3 if has_masters else 2) * FP32_BYTES
    optimizer_on_host, weights_on_host = offloads(ds_config)
    host = 0.0
    if optimizer_on_host:  # gradients are accumulated there, too
        host, gradients, optimizer = gradients + optimizer, 0.0, 0.0
    if weights_on_host:
        host, weights = host + weights, 0.0
    return (weights + fetched, gradients, optimizer), host
