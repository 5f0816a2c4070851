"""Runs and engines of the GPU check: the shipped recipes, or on a CPU models of two blocks in fp32."""

import functools
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import profile

from bench._models import make_batch
from gpu.check import ROOT, TOY, Check
from megatron_bipe.config import RunConfig, engine_config, load_run_config, read_ds_config
from megatron_bipe.estimate.memory import stage_memories
from megatron_bipe.estimate.step_time import predict_step
from megatron_bipe.model import train_flops_per_token
from megatron_bipe.parallel import Mesh
from megatron_bipe.runtime.distributed_init import join_launch
from megatron_bipe.runtime.hardware import (
    DTYPES,
    choose_precision,
    device_type,
    keep_freed_memory,
    own_gpu,
    peak_flops,
    peak_memory_gib,
)
from megatron_bipe.types import Batch

LR = 1e-4
SMALL_MODEL = (
    "model={num_layers: 4, hidden_size: 128, num_heads: 4, ffn_size: 256, vocab_size: 512, intra_size: 64}",
    "optimizer={lr: 1e-3, warmup_steps: 0, grad_clip: 0.5}",
)


class Speed(NamedTuple):
    """Measured speed and memory of updates."""

    tokens_per_s: float
    mfu: float | None  # None if the device's peak is unknown
    allocated_gib: float
    reserved_gib: float


@functools.cache
def this_rank() -> Mesh:
    mesh = join_launch()
    keep_freed_memory(mesh.device)
    return mesh


def recipe(check: Check, name: str, *settings: str) -> RunConfig:
    """Return a shipped recipe with one rank's precision, such as `bipe_rope_151m`; on a CPU, a toy of its encoding."""
    toy = () if check.on_gpu else TOY
    nothing_saved = "checkpoint.asynchronous=false"  # no memory for copies of the state is allocated
    run = load_run_config(ROOT / "examples" / f"{name}.yaml", [*toy, nothing_saved, *settings])
    precision = choose_precision(run.train.precision, this_rank().device, "train.precision").precision
    return run.model_copy(update={"train": run.train.model_copy(update={"precision": precision})})


def with_batches(run: RunConfig, micro_batch: int, accumulation: int) -> RunConfig:
    """Return the run with another micro-batch, and a global batch of `accumulation` of them."""
    update = {"micro_batch": micro_batch, "global_batch": micro_batch * accumulation}
    return run.model_copy(update={"train": run.train.model_copy(update=update)})


@contextmanager
def started(run: RunConfig, zero: int | str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Give the engine of a run on this device, with its DeepSpeed configuration, and free its memory.

    DeepSpeed keeps the state of ZeRO 3 until the process ends, so such an engine should be the last one.
    """
    from megatron_bipe.engine.engines import start_engine

    forget_compiled_code()
    path = ROOT / "ds_configs" / f"zero{zero}.json"
    ds_config = engine_config(run, read_ds_config(path), 1, path)
    engine: Any = start_engine(run, ds_config, this_rank().with_layout(run.parallel))
    try:
        yield engine, ds_config
    finally:
        engine._saver.finish()
        engine._engine.destroy()
        engine.__dict__.clear()
        gc.collect()
        if this_rank().device.type == "cuda":
            torch.cuda.empty_cache()


def forget_compiled_code() -> None:
    """Let torch.compile begin again, so that earlier shapes do not make it choose kernels for any shape."""
    if this_rank().device.type == "cuda":
        torch.compiler.reset()


def micro_batches(run: RunConfig) -> list[Batch[Tensor]]:
    """Return the micro-batches of an update, of random tokens."""
    train = run.train
    batch = make_batch(run.model.vocab_size, train.micro_batch, train.seq_len_tokens)
    return [batch] * (train.global_batch // train.micro_batch)


def measure_updates(engine: Any, run: RunConfig, warm_up: int, updates: int) -> Speed:
    """Time updates after a warm-up, in which kernels are compiled and chosen."""
    device, batches = this_rank().device, micro_batches(run)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warm_up):
        result = engine.train_step(batches, LR)
    float(result.loss_nats)  # waits for the device
    began_s = time.perf_counter()
    for _ in range(updates):
        result = engine.train_step(batches, LR)
    float(result.loss_nats)
    wait_for_device(device)
    tokens_per_s = updates * run.train.global_batch * run.train.seq_len_tokens / (time.perf_counter() - began_s)
    peak = peak_flops(device, DTYPES[run.train.precision])
    mfu = tokens_per_s * train_flops_per_token(run.model, run.train.seq_len_tokens) / peak if peak else None
    reserved_gib = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else 0.0
    return Speed(tokens_per_s, mfu, peak_memory_gib(device), reserved_gib)


def kernel_times(profiler: profile, on_gpu: bool) -> list[tuple[float, int, str]]:
    """Return microseconds, number of calls and name of each kernel; on a CPU, of each operation.

    Marked ranges, such as those of torch.compile and of an optimizer's step, are not included: on a GPU they have the
    time of all kernels within them.
    """
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    return [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
        if event.device_type == wanted and not event.is_user_annotation
    ]


def estimated_gib(run: RunConfig, ds_config: dict[str, Any]) -> float:
    """Return the memory on the device that `--dry-run` shows."""
    return stage_memories(run, ds_config, 1, on_gpu=device_type() == "cuda")[0].device / 2**30


def predicted(run: RunConfig, ds_config: dict[str, Any]) -> float | None:
    """Return the predicted tokens per second of a run in bf16 on this GPU; None on a CPU and for unknown GPUs."""
    gpu = own_gpu(torch.device(device_type()))
    return predict_step(run, ds_config, 1, gpu).tokens_per_second if gpu else None


def wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
