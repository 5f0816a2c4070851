"""Losses of every ZeRO stage against those of a CPU, updates with NaN, and operations that wait for the device."""

import json
import math
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench._models import make_batch
from gpu.check import ROOT, Check
from gpu.engines import SMALL_MODEL, recipe, started, with_batches
from megatron_bipe.config import RunConfig, load_run_config
from megatron_bipe.engine.deepspeed_internals import fragments
from megatron_bipe.runtime.child_processes import run_command
from megatron_bipe.runtime.environment import DEVICE
from megatron_bipe.types import Batch

UPDATES, MICRO_BATCH, ACCUMULATION, SMALL_LR, SEQ_LEN = 8, 4, 2, 1e-3, 64
MODES = [("0", "none"), ("1", "none"), ("1", "selective"), ("1", "full"), ("2", "none"), ("3", "none")]
MODES += [("2_offload", "none"), ("3_offload", "none")]
EXPECTED = "losses.json"


def parity(check: Check) -> None:
    """Report the largest relative differences of losses from those of a CPU, and effects of a NaN."""
    script = str(ROOT / "tools" / "gpu_check.py")
    command = [sys.executable, script, "--run-part", "gpu.correctness:reference", "--output", str(check.folder)]
    run_command(command, check=True, env={DEVICE: "cpu"}, cwd=ROOT, stdout=subprocess.DEVNULL)
    expected = json.loads((check.folder / EXPECTED).read_text())
    for precision in ("fp32", "bf16") if check.on_gpu else ("fp32",):
        worst, changed = 0.0, 0
        for zero, recompute in MODES:
            name = f"{precision}, ZeRO {zero}, recompute {recompute}"
            with started(small_run(check.folder, precision, recompute), zero) as training:
                losses = train(training.engine)
                difference = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
                changed += changes_by_nan(training.engine)
            check.report(f"{name}: loss difference", difference)
            worst = max(worst, difference) if math.isfinite(difference) else math.nan
        check.report(f"{precision}: largest loss difference", worst)
        check.report(f"{precision}: engines that a NaN changed", changed)


def reference(check: Check) -> None:
    """Write the losses of fp32 without ZeRO on this device."""
    with started(small_run(check.folder, "fp32", "none"), "0") as training:
        (check.folder / EXPECTED).write_text(json.dumps(train(training.engine)))


def small_run(folder: Path, precision: str, recompute: str) -> RunConfig:
    train = f"train={{steps: {UPDATES}, seq_len_tokens: {SEQ_LEN}, precision: {precision}, compile: 'off', "
    sizes = f"micro_batch: {MICRO_BATCH}, global_batch: {MICRO_BATCH * ACCUMULATION}}}"
    settings = [*SMALL_MODEL, train + sizes, f"parallel.recompute={recompute}", f"run_dir={folder}"]
    settings.append("checkpoint.asynchronous=false")
    return load_run_config(None, settings)


def train(engine: Any) -> list[float]:
    """Return the losses of updates on the same batches, which the model begins to memorize."""
    batch = make_batch(512, MICRO_BATCH, SEQ_LEN)
    return [float(engine.train_step([batch] * ACCUMULATION, SMALL_LR).loss_nats) for _ in range(UPDATES)]


def changes_by_nan(engine: Any) -> bool:
    """Return True if an update with a NaN loss changes weights or optimizer state, or its gradient norm is finite."""
    batch: Batch[Tensor] = make_batch(512, MICRO_BATCH, SEQ_LEN)
    bad = batch._replace(weights_BT=torch.full(batch.labels_BT.shape, math.nan))
    before = state_of(engine)
    norm = float(engine.train_step([batch] * (ACCUMULATION - 1) + [bad], SMALL_LR).grad_norm)
    after = state_of(engine)
    return math.isfinite(norm) or any(not torch.equal(after[key], before[key]) for key in before)


def state_of(engine: Any) -> dict[tuple[str, str], Tensor]:
    """Return copies of master weights and moments."""
    held = fragments(engine._engine.module, engine._optimizer)
    return {(f.name, kind): tensor.detach().clone() for f in held for kind, tensor in f.state.items()}


class Waits:
    """Operations that waited for the device, by file and line, since the last call of `take`."""

    def __init__(self) -> None:
        self.at: Counter[str] = Counter()

    def take(self) -> Counter[str]:
        found, self.at = self.at, Counter()
        return found

    def called(self) -> None:
        """Count the caller of torch.cuda.synchronize, the last frame outside torch and accelerators."""
        frames = [f for f in traceback.extract_stack() if "accelerator" not in f.filename and f.name != "called"]
        frame = next((f for f in reversed(frames) if not _is_of_tool(f.filename)), frames[-1])
        self.at[f"{shorten(frame.filename)}:{frame.lineno} synchronize"] += 1

    def warned(self, message: Any, _category: Any, filename: str, lineno: int, *_: Any) -> None:
        """Count a warning of torch's debug mode."""
        if "synchroniz" in str(message):
            self.at[f"{shorten(filename)}:{lineno}"] += 1


def _is_of_tool(filename: str) -> bool:
    return filename == __file__ or filename.endswith("unittest/mock.py")


def shorten(filename: str) -> str:
    """Return a file's path below its package's folder."""
    parts = Path(filename).parts
    begin = max((n for n, part in enumerate(parts) if part in ("site-packages", ROOT.name)), default=-1)
    return str(Path(*parts[begin + 1 :]))


@contextmanager
def watched() -> Iterator[Waits]:
    """Record operations that wait for the device: torch's debug mode reports all but explicit synchronizations."""
    waits = Waits()

    def recorded(real: Callable[..., Any]) -> Callable[..., Any]:
        def synchronize(*arguments: Any, **options: Any) -> Any:
            waits.called()
            return real(*arguments, **options)

        return synchronize

    on_gpu = torch.cuda.is_available()
    with (
        warnings.catch_warnings(),
        mock.patch.object(warnings, "showwarning", waits.warned),
        mock.patch.object(torch.cuda, "synchronize", recorded(torch.cuda.synchronize if on_gpu else lambda *_: None)),
        mock.patch.object(torch.cuda.Stream, "synchronize", recorded(torch.cuda.Stream.synchronize)),
        mock.patch.object(torch.cuda.Event, "synchronize", recorded(torch.cuda.Event.synchronize)),
    ):
        warnings.simplefilter("always")
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")


def synchronizations(check: Check) -> None:
    """Report how often a micro-batch and an update wait for the device, and where."""
    for zero in ("1", "2"):
        for encoding in ("bipe_rope", "bipe_alibi"):
            run = with_batches(recipe(check, f"{encoding}_151m", "train.compile=off"), check.choose(8, 2), 4)
            with started(run, zero) as training:
                batch = make_batch(run.model.vocab_size, run.train.micro_batch, run.train.seq_len_tokens)
                _train_watched(training.engine, batch)  # allocates, compiles and chooses kernels
                per_micro_batch, per_update = _train_watched(training.engine, batch)
            name = f"ZeRO {zero}, {encoding}"
            check.report(f"{name}: waits per micro-batch", sum(per_micro_batch.values()))
            check.report(f"{name}: waits per update", sum(per_update.values()))
            for kind, found in (("micro-batch", per_micro_batch), ("update", per_update)):
                for location, count in found.most_common():
                    check.report(f"{name}: {kind}: {location}", count)


def _train_watched(engine: Any, batch: Batch[Tensor]) -> tuple[Counter[str], Counter[str]]:
    """Train two updates; return the waits of the second one's third micro-batch, and those of the update alone."""
    found: list[Counter[str]] = []

    def micro_batches(waits: Waits) -> Iterator[Batch[Tensor]]:
        for _ in range(4):
            found.append(waits.take())  # of the micro-batch before
            yield batch

    with watched() as waits:
        for _ in range(2):
            engine.train_step(micro_batches(waits), 1e-4)
        last = waits.take()  # the last micro-batch, and the update
    per_micro_batch = found[-1]
    return per_micro_batch, last - per_micro_batch
