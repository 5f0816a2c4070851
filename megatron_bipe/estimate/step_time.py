"""Predicted time of an optimizer step on GPUs in bf16, by a roofline model; nothing is run.

A micro-batch takes the sum of

    matrix products   FLOPs / (peak x efficiency), where narrow models reach less of the peak
    attention         the same, with the efficiency of the fused kernels
    element-wise      bytes moved by all other kernels of the blocks / memory bandwidth
    loss              bytes moved for the logits / memory bandwidth
    gradient sums     bytes moved to add the micro-batch's gradients to the sum / memory bandwidth
    waits             synchronizations, and the time by which the host is slower than the GPU at launching kernels
    communication     what does not overlap with computation

and an update adds that of the optimizer and the communication of ZeRO. Byte counts come from the operators that this
code runs. Efficiencies and overlaps are assumed until `tools/gpu_check.py` has measured them.
"""

import itertools
from typing import Any, NamedTuple

from megatron_bipe.config import ModelConfig, ParallelConfig, RunConfig, accumulation_steps, offloads, zero_stage
from megatron_bipe.errors import ConfigError
from megatron_bipe.estimate.communication import parameters_of_largest_stage, step_traffic
from megatron_bipe.estimate.memory import logits_bytes, stage_bounds, tokens_here
from megatron_bipe.model import train_flops_per_token
from megatron_bipe.model.positions.base import relative_class
from megatron_bipe.parallel import layer_costs
from megatron_bipe.runtime.gpus import Gpu
from megatron_bipe.runtime.hardware import choose_compile

_WIDTH = 2  # bytes of a bf16 number

# Fraction of the bf16 peak that products reach: 0.88 / (1 + 610 / width of the model), which is 0.49 at 768, 0.68 at
# 2048 and 0.82 at 8192 channels. Assumed; published products of 8192 x 8192 matrices on an H100 reach 0.81.
_PRODUCT_LIMIT, _PRODUCT_HALF_WIDTH = 0.88, 610
# Fraction of the peak that attention reaches, forward and backward of 1,024 causal tokens; assumed.
_ATTENTION_64, _ATTENTION_128 = 0.205, 0.325  # by head width, cuDNN's or FlashAttention's kernels
_ATTENTION_WIDER = 0.225  # more than 128 channels with those of a bias: only FlashAttention 2 accepts them
_MEMORY_EFFICIENCY = 0.87  # of the data sheet's bandwidth; assumed: 2.9 of 3.35 TB/s on an H100
_LINK_EFFICIENCY = 0.8  # of NVLink, PCIe and network, in NCCL's collectives; assumed
_WAIT_S = 1.3e-3  # until the GPU has queued work again after a synchronization; assumed

_BACKWARD = 2 / 3  # fraction of a micro-batch's time, during which ZeRO 2 and 3 reduce gradients
_RECOMPUTED_PRODUCTS, _RECOMPUTED_ELEMENTWISE = 4 / 3, 1.29  # with recomputation, relative to without


class Costs(NamedTuple):
    """What a micro-batch costs besides products and attention.

    `hidden_moves` and `ffn_moves` are the numbers that forward and backward of a block read or write in memory per
    token, as multiples of the model's width and of the feed-forward width.
    """

    hidden_moves: float
    ffn_moves: float
    logit_bytes: float  # moved per logit
    sum_bytes: float  # moved per parameter of a rank
    waits: int  # synchronizations
    host_block_s: float  # time of the host to launch the kernels of a block, forward and backward
    slowdown: float = 1.0  # factor of the time of a micro-batch, if it was measured


# Operators of one block of BiPE-RoPE, counted by torch's dispatcher at 151M and 1.6B for 8 x 1,024 tokens: 26 launches
# forward and 44 backward with three views of queries, keys and values. They moved 95.6 widths besides SwiGLU, of which
# one split in place of the views takes 27 away. SwiGLU moves 18 feed-forward widths: silu 2 and product 3, and backward
# silu 2, products 3 + 3, gradient of silu 3, copy 2. The loss reads and writes fp32 copies of parts: 64 bytes a logit.
EAGER = Costs(hidden_moves=68.6, ffn_moves=18, logit_bytes=64, sum_bytes=0, waits=0, host_block_s=1.4e-3)
# Counted for BiPE-RoPE by tools/bench/kernels.py (docs/performance.md): 10.11 GB at 151M and 53.15 GB at 1.6B for 8 x
# 1,024 tokens, so 65 widths a token and block besides 23 of embedding and last norm. SwiGLU has 8 feed-forward widths
# of them (3 forward, 5 backward), which are 32 of the model. Logits are read once forward, read and written backward.
COMPILED = Costs(hidden_moves=33, ffn_moves=8, logit_bytes=6, sum_bytes=0, waits=0, host_block_s=0.5e-3)
_SHARDED_LOGIT_BYTES = 2  # more, if the vocabulary is sharded: the compiled maximum is then a kernel of its own

# Bytes moved per parameter to add a gradient to its sum, by ZeRO stage: a bf16 sum; one mixed addition to an fp32 sum;
# DeepSpeed's copy into a bucket, division, concatenation, cast, addition and copy back (assumed for ZeRO 3, too).
_SUM_BYTES = {0: 6, 1: 10, 2: 34, 3: 34}
# Of the optimizer, per parameter of a rank's shard: norm 4, clipping 8, Adam 30; all gradients are zeroed, 4.
_UPDATE_SHARD_BYTES, _UPDATE_BYTES = 42, 4
_UPDATE_WAITS = 1
_ZERO_3_HOST_FACTOR = 3.3  # launching with DeepSpeed's hooks of ZeRO 3 takes this many times as long as with ZeRO 1


class StepTime(NamedTuple):
    """Predicted seconds of one optimizer step, and rates of all ranks together."""

    products_s: float
    attention_s: float
    elementwise_s: float
    loss_s: float
    gradient_sums_s: float
    waits_s: float
    micro_batch_communication_s: float  # what computation does not hide
    update_s: float  # of the optimizer
    update_communication_s: float
    bubble_s: float  # pipeline stages wait for the first and the last micro-batch
    tokens_per_second: float = 0.0
    mfu: float = 0.0

    @property
    def total_s(self) -> float:
        return sum(self[:-2])


def predict_step(
    run: RunConfig, ds_config: dict[str, Any], num_ranks: int, gpu: Gpu, costs: Costs | None = None
) -> StepTime:
    """Predict the time of one optimizer step on GPUs of one kind.

    The time of T5's score matrix and of CPU offloading is not included (`unpredictable`).

    Args:
        run: the run configuration, validated for `num_ranks`, with bf16 precision.
        ds_config: result of `config.deepspeed.engine_config`.
        num_ranks: ranks of the launch, one a GPU.
        gpu: the GPU of every rank, with its machine and network.
        costs: costs of a micro-batch; None: those of the code that runs with this configuration.

    Raises:
        ConfigError: the precision is not bf16.
    """
    if run.train.precision != "bf16":
        raise ConfigError(
            f"train.precision={run.train.precision}: the time of a step is predicted for bf16 only",
            remedy="--set train.precision=bf16",
            location="train.precision",
        )
    micro_batches = accumulation_steps(run.train, run.parallel.data_ranks(num_ranks))
    micro = _micro_batch(run, gpu, costs or costs_of(run, ds_config))
    busy_s = micro.total_s
    micro_s, update_s = _exposed_communication(run, ds_config, num_ranks, gpu, busy_s * micro_batches)
    slots = run.parallel.pipeline - 1
    parameters = parameters_of_largest_stage(run)
    shard = parameters / (run.parallel.replica_ranks(num_ranks) if zero_stage(ds_config) else 1)
    update_bytes = _UPDATE_BYTES * parameters + _UPDATE_SHARD_BYTES * shard
    step = StepTime(*(part * micro_batches for part in micro[:-2]))._replace(
        micro_batch_communication_s=micro_s,
        update_s=update_bytes / (gpu.memory_bytes_s * _MEMORY_EFFICIENCY),
        update_communication_s=update_s,
        bubble_s=slots * (busy_s + micro_s / micro_batches),
    )
    step = step._replace(waits_s=step.waits_s + _UPDATE_WAITS * _WAIT_S)
    tokens = run.train.global_batch * run.train.seq_len_tokens
    flops = tokens * train_flops_per_token(run.model, run.train.seq_len_tokens)
    return step._replace(
        tokens_per_second=tokens / step.total_s, mfu=flops / (step.total_s * num_ranks * gpu.bf16_flops)
    )


def unpredictable(run: RunConfig, ds_config: dict[str, Any]) -> str:
    """Return the setting for which the time of a step is not predicted; "" if there is none."""
    if run.train.precision != "bf16":
        return f"for train.precision={run.train.precision}"
    if any(offloads(ds_config)):
        return "with CPU offloading"
    if relative_class(run.model).biases_scores:
        return f"for model.encoding={run.model.encoding}"
    return ""


def measured_slowdown(run: RunConfig, gpu: Gpu, mfu: float) -> float:
    """Return the factor of predicted times at which a micro-batch on one GPU reaches a measured utilization.

    Args:
        run: the run configuration, with bf16 precision; its layout does not matter.
        gpu: the GPU.
        mfu: model FLOPs utilization of the run on one GPU with ZeRO 1, without recomputation.
    """
    alone, tokens = run.model_copy(update={"parallel": ParallelConfig()}), run.train.seq_len_tokens
    flops = run.train.micro_batch * tokens * train_flops_per_token(run.model, tokens)
    predicted_s = _micro_batch(alone, gpu, costs_of(alone, {"zero_optimization": {"stage": 1}})).total_s
    return flops / (gpu.bf16_flops * mfu) / predicted_s


def costs_of(run: RunConfig, ds_config: dict[str, Any]) -> Costs:
    """Return the costs of the code that a run on GPUs uses."""
    zero = zero_stage(ds_config)
    costs = COMPILED if choose_compile(run, zero, on_gpu=True).compiles else EAGER
    if costs is COMPILED and run.parallel.tensor > 1:
        costs = costs._replace(logit_bytes=costs.logit_bytes + _SHARDED_LOGIT_BYTES)
    factor = _ZERO_3_HOST_FACTOR if zero == 3 else 1
    return costs._replace(
        sum_bytes=_SUM_BYTES[zero], waits=1 if zero > 1 else 0, host_block_s=costs.host_block_s * factor
    )


def _micro_batch(run: RunConfig, gpu: Gpu, costs: Costs) -> StepTime:
    """Return the times of one micro-batch on a rank of the most expensive stage, without communication."""
    model, parallel = run.model, run.parallel
    stage_share = _largest_stage_share(run)
    tokens, bandwidth = tokens_here(run), gpu.memory_bytes_s * _MEMORY_EFFICIENCY
    flops = tokens * train_flops_per_token(model, run.train.seq_len_tokens) / parallel.tensor * stage_share
    attention_flops = flops * _attention_share(model, run.train.seq_len_tokens)
    blocks = model.num_layers * stage_share
    split_hidden = parallel.tensor if parallel.sequence else 1
    moves = costs.hidden_moves * model.hidden_size / split_hidden + costs.ffn_moves * model.ffn_size / parallel.tensor
    recomputes_all, recomputes = parallel.recompute == "full", parallel.recompute != "none"
    product_factor = _RECOMPUTED_PRODUCTS if recomputes_all else 1
    elementwise_factor = _RECOMPUTED_ELEMENTWISE if recomputes else 1
    widened = 1 + relative_class(model).num_extra_channels(model.head_width) / model.head_width
    width = model.hidden_size / parallel.tensor
    product_rate = gpu.bf16_flops * _PRODUCT_LIMIT / (1 + _PRODUCT_HALF_WIDTH / width)
    times = StepTime(
        products_s=(flops - attention_flops) / product_rate * product_factor,
        attention_s=attention_flops * widened / (gpu.bf16_flops * _attention_efficiency(model)) * product_factor,
        elementwise_s=blocks * tokens * moves * _WIDTH / bandwidth * elementwise_factor,
        loss_s=logits_bytes(run) / _WIDTH * costs.logit_bytes / bandwidth * stage_share,
        gradient_sums_s=parameters_of_largest_stage(run) * costs.sum_bytes / bandwidth,
        waits_s=costs.waits * _WAIT_S,
        micro_batch_communication_s=0.0,
        update_s=0.0,
        update_communication_s=0.0,
        bubble_s=0.0,
    )
    launching_s = blocks * costs.host_block_s
    times = times._replace(waits_s=max(times.waits_s, launching_s - (times.total_s - times.waits_s)))
    return StepTime(*(part * costs.slowdown for part in times))


def _largest_stage_share(run: RunConfig) -> float:
    """Return the fraction of all multiplications that the most expensive stage has."""
    costs = layer_costs(run.model, run.train.seq_len_tokens)
    bounds = stage_bounds(run.model, run.train.seq_len_tokens, run.parallel.pipeline)
    return max(sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds)) / sum(costs)


def _attention_share(model: ModelConfig, seq_len_tokens: int) -> float:
    """Return the fraction of a micro-batch's FLOPs that are attention's scores and weighted sums."""
    without = train_flops_per_token(model, 0)
    return 1 - without / train_flops_per_token(model, seq_len_tokens)


def _attention_efficiency(model: ModelConfig) -> float:
    if model.head_width + relative_class(model).num_extra_channels(model.head_width) > 128:
        return _ATTENTION_WIDER
    return _ATTENTION_64 if model.head_width <= 64 else _ATTENTION_128


def _exposed_communication(
    run: RunConfig, ds_config: dict[str, Any], num_ranks: int, gpu: Gpu, busy_s: float
) -> tuple[float, float]:
    """Return the seconds of a step that its micro-batches and its update wait for communication.

    Data-parallel communication of ZeRO 2 (if `overlap_comm` is on) overlaps with backward, that of ZeRO 3 with all
    computation; everything else is exposed.

    Args:
        run: the run configuration.
        ds_config: result of `config.deepspeed.engine_config`.
        num_ranks: ranks of the launch.
        gpu: the GPU of every rank.
        busy_s: computation of all micro-batches.
    """
    zero = zero_stage(ds_config)
    exposed_s = overlapped_s = update_s = 0.0
    for kind in step_traffic(run, ds_config, num_ranks):
        seconds = kind.bytes_sent / (_bandwidth(kind.axis, run.parallel, num_ranks, gpu) * _LINK_EFFICIENCY)
        if kind.is_update:
            update_s += seconds
        elif kind.axis == "data":
            overlapped_s += seconds
        else:
            exposed_s += seconds
    overlaps = zero == 3 or ds_config.get("zero_optimization", {}).get("overlap_comm", False)
    hidden_s = busy_s * (1 if zero == 3 else _BACKWARD) if overlaps else 0.0
    return exposed_s + max(0.0, overlapped_s - hidden_s), update_s


def _bandwidth(axis: str, parallel: ParallelConfig, num_ranks: int, gpu: Gpu) -> float:
    """Return the bytes per second that a rank can send to the other ranks of its group.

    In a ring over several machines (tensor, data), all ranks of a machine send through the network, each by its own
    adapter. In an all-to-all (context), and between stages, a rank has its own adapter only.
    """
    stride, size = {  # ranks between neighbours, and ranks
        "tensor": (1, parallel.tensor),
        "context": (parallel.tensor, parallel.context),
        "data": (parallel.tensor, parallel.replica_ranks(num_ranks)),
        "pipeline": (num_ranks // parallel.pipeline, parallel.pipeline),
    }[axis]
    if num_ranks <= gpu.gpus_per_machine or gpu.gpus_per_machine % (stride * size) == 0:
        return gpu.link_bytes_s
    ranks_here = max(1, gpu.gpus_per_machine // stride) if axis in ("tensor", "data") else 1
    return min(gpu.link_bytes_s, ranks_here * gpu.network_bytes_s)
