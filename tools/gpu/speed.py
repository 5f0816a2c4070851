"""Speed and memory of the recipes, compiled and eager, and of transformers under the same engine."""

from functools import partial
from pathlib import Path

import torch

from bench._models import PEER, measure
from bench.train import prepare_ours, prepare_peer
from gpu.check import PREDICTED, TOY, Check
from gpu.engines import (
    LR,
    Training,
    estimated_gib,
    measure_updates,
    micro_batches,
    predicted,
    recipe,
    started,
    with_batches,
)
from gpu.kernels import kernels_of

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
            with started(run, "1") as training:
                speeds[encoding, compiles] = _report_speed(check, name, training, (5, 20))
                write_kernels(training, check.folder / f"kernels-{encoding}-{compiles}.txt")
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
        with started(with_batches(run, sizes[0], 2), "1") as training:
            for size in sizes:
                sized = training._replace(run=with_batches(run, size, 2))
                name = f"1.6B {encoding}, micro-batch {size}, ZeRO 1"
                try:
                    speeds[encoding, size] = _report_speed(check, name, sized, (2, 6))
                except torch.OutOfMemoryError:  # the second size needs about 70 GiB (an estimate)
                    check.report(f"{name}: tokens/s", "out of memory")
    rope, alibi = (speeds.get((encoding, check.choose(8, 2))) for encoding in plan)
    if rope and alibi:
        check.report("1.6B: speed of bipe_alibi over bipe_rope", alibi / rope)
    for zero in ("2", "3"):  # 3 comes last: its memory is not freed
        run = with_batches(recipe(check, "bipe_rope_1.6b", compiles), check.choose(8, 2), 2)
        with started(run, zero) as training:
            _report_speed(check, f"1.6B bipe_rope, ZeRO {zero}", training, (2, 3))


def _possible(check: Check, compiles: str) -> str:
    """Return the setting on a GPU; a CPU has no time for a compilation."""
    return compiles if check.on_gpu else "off"


def _report_speed(check: Check, name: str, training: Training, updates: tuple[int, int]) -> float:
    """Report speed and memory after updates of a warm-up and timed ones; return the tokens per second."""
    engine, run, ds_config = training
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


def write_kernels(training: Training, file: Path) -> None:
    """Write the longest kernels of an update and their times; on a CPU, the operations."""
    found = kernels_of(partial(training.engine.train_step, micro_batches(training.run), LR))
    total_us = sum(kernel.time_us for kernel in found) or 1.0
    lines = [f"{us / 1000:10.3f} ms {us / total_us:6.1%} {count:6} x {name}" for us, count, name in found]
    file.write_text("\n".join([f"an update: {total_us / 1000:.3f} ms", *lines[:NUM_KERNELS]]) + "\n")


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
