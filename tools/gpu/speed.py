"""Speed and memory of the recipes, compiled and eager, and of transformers under the same engine."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench._models import PEER, measure
from bench.train import prepare_ours, prepare_peer
from gpu.check import PREDICTED, TOY, Check
from gpu.engines import (
    LR,
    estimated_gib,
    forget_compiled_code,
    kernel_times,
    measure_updates,
    micro_batches,
    predicted,
    recipe,
    started,
    wait_for_device,
    with_batches,
)
from megatron_bipe.config import RunConfig

NUM_KERNELS = 30
OURS = "BiPE-RoPE"


def speed_151m(check: Check) -> None:
    """Report speed and memory of the 151M recipes, with and without compilation, and their longest kernels."""
    speeds = {}
    for compiles in ("on", "off"):
        for encoding in ("bipe_rope", "bipe_alibi", "rope"):
            run = recipe(check, f"{encoding}_151m", f"train.compile={_possible(check, compiles)}")
            run = with_batches(run, run.train.micro_batch, 4)
            name = f"151M {encoding}, compile {compiles}"
            with started(run, "1") as (engine, ds_config):
                speeds[encoding, compiles] = _report_speed(check, name, engine, run, ds_config, (5, 20))
                file = check.folder / f"kernels-{encoding}-{compiles}.txt"
                write_kernels(engine, run, file)
        check.report(
            f"151M, compile {compiles}: speed of bipe_alibi over rope",
            speeds["bipe_alibi", compiles] / speeds["rope", compiles],
        )


def speed_1_6b(check: Check) -> None:
    """Report speed and memory of the 1.6B recipes: ZeRO 1 with two sizes of the micro-batch, then ZeRO 2 and 3."""
    speeds = {}
    compiles = f"train.compile={_possible(check, 'auto')}"
    plan: dict[str, tuple[int, ...]] = {"bipe_rope": (8, 16), "bipe_alibi": (8,)}
    for encoding, sizes in plan.items():
        run = recipe(check, f"{encoding}_1.6b", compiles)
        sizes = sizes if check.on_gpu else tuple(size // 4 for size in sizes)
        with started(with_batches(run, sizes[0], 2), "1") as (engine, ds_config):
            for size in sizes:
                forget_compiled_code()  # else a second size would be compiled for any size
                sized, name = with_batches(run, size, 2), f"1.6B {encoding}, micro-batch {size}, ZeRO 1"
                try:
                    speeds[encoding, size] = _report_speed(check, name, engine, sized, ds_config, (2, 6))
                except torch.OutOfMemoryError:  # the second size needs about 70 GiB (an estimate)
                    check.report(f"{name}: tokens/s", "out of memory")
    first = min(size for _, size in speeds)
    check.report("1.6B: speed of bipe_alibi over bipe_rope", speeds["bipe_alibi", first] / speeds["bipe_rope", first])
    for zero in ("2", "3"):  # 3 comes last: its memory is not freed
        run = with_batches(recipe(check, "bipe_rope_1.6b", compiles), check.choose(8, 2), 2)
        with started(run, zero) as (engine, ds_config):
            _report_speed(check, f"1.6B bipe_rope, ZeRO {zero}", engine, run, ds_config, (2, 3))


def _possible(check: Check, compiles: str) -> str:
    """Return the setting on a GPU; a CPU has no time for a compilation."""
    return compiles if check.on_gpu else "off"


def _report_speed(
    check: Check, name: str, engine: Any, run: RunConfig, ds_config: dict[str, Any], updates: tuple[int, int]
) -> float:
    warm_up, timed = updates if check.on_gpu else (1, 1)
    speed = measure_updates(engine, run, warm_up, timed)
    check.report(f"{name}: tokens/s", speed.tokens_per_s)
    prediction = predicted(run, ds_config)
    if prediction is not None:
        check.report(f"{name}: tokens/s{PREDICTED}", prediction)
    if speed.mfu is not None:
        check.report(f"{name}: MFU", speed.mfu)
        if prediction is not None:
            check.report(f"{name}: MFU{PREDICTED}", speed.mfu * prediction / speed.tokens_per_s)
    check.report(f"{name}: peak GiB", speed.allocated_gib)
    check.report(f"{name}: peak GiB{PREDICTED}", estimated_gib(run, ds_config))
    check.report(f"{name}: reserved GiB", speed.reserved_gib)
    return speed.tokens_per_s


def write_kernels(engine: Any, run: RunConfig, file: Path) -> None:
    """Write the longest kernels of an update and their times; on a CPU, the operations."""
    on_gpu = torch.cuda.is_available() and engine._mesh.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        engine.train_step(micro_batches(run), LR)
        wait_for_device(engine._mesh.device)
    rows = kernel_times(profiler, on_gpu)
    total = sum(us for us, _, _ in rows) or 1.0
    lines = [f"{us / 1000:10.3f} ms {us / total:6.1%} {n:6} x {key}" for us, n, key in sorted(rows, reverse=True)]
    file.write_text("\n".join([f"an update: {total / 1000:.3f} ms", *lines[:NUM_KERNELS]]) + "\n")


def peers(check: Check) -> None:
    """Report the speed of BiPE-RoPE over that of transformers' Llama under the same engine."""
    given = ("model.num_layers=12",) if check.on_gpu else TOY
    settings = (None, given, Path("ds_configs/zero1.json"))
    contenders = {OURS: partial(prepare_ours, settings, "bipe_rope"), PEER: partial(prepare_peer, settings)}
    found = measure(contenders, check.choose(20, 2))
    for name, measured in found.items():
        check.report(f"{name}: s per step", measured.median_s)
        check.report(f"{name}: peak GiB", measured.peak_gib)
    check.report(f"speed of {OURS} over {PEER}", found[PEER].median_s / found[OURS].median_s)
