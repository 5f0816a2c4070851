"""What a run says of itself: metrics.jsonl (every step), TensorBoard, and a progress line now and then."""

import datetime
import json
import logging
import math
import time
from pathlib import Path
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter

from megatron_bipe.config.schema import RunConfig
from megatron_bipe.engine.api import StepResult
from megatron_bipe.model.plan import train_flops_per_token
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.train.hardware import peak_memory_gib

_log = logging.getLogger(__name__)


class Metrics:
    """Collects steps and writes them every `train.log_every`; ranks other than the main one write nothing.

    Reading a loss waits for the device, so results are kept as they are until the next line is due.

    Args:
        run: the run.
        mesh: this process among the ranks.
        start: updates done before; later lines of an earlier attempt are dropped from metrics.jsonl.
        peak_flops: FLOP/s that one rank could do, None where unknown.
    """

    def __init__(self, run: RunConfig, mesh: Mesh, start: int, peak_flops: float | None) -> None:
        self._run, self._mesh = run, mesh
        self._waiting: list[tuple[int, StepResult, float]] = []
        tokens = run.train.global_batch * run.train.seq_len_tokens
        self._tokens_per_step = tokens
        flops = train_flops_per_token(run.model, run.train.seq_len_tokens) * tokens
        self._ideal_step_s = flops / (peak_flops * mesh.num_ranks) if peak_flops else None
        self._since = time.perf_counter()
        if mesh.is_main:
            self._file = _reopen(run.run_dir / "metrics.jsonl", start)
            self._board = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=start + 1)

    def step(self, step: int, result: StepResult, lr: float) -> None:
        """Take the result of update `step` (from 1)."""
        self._waiting.append((step, result, lr))
        if step % self._run.train.log_every == 0:
            self.flush()

    def valid(self, step: int, loss_nats: float) -> None:
        """Take the validation loss after update `step`; the time it took is not training time."""
        self.flush()
        perplexity = math.exp(loss_nats)
        self._write(step, {"loss/valid_nats": loss_nats, "valid/perplexity": perplexity})
        if self._mesh.is_main:
            _log.info("step %d | validation loss %.4f | perplexity %.2f", step, loss_nats, perplexity)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last step out of the step times."""
        self._since = time.perf_counter()

    def flush(self) -> None:
        """Write all steps taken so far; their time is shared evenly."""
        if not self._waiting:
            return
        losses = [float(result.loss_nats) for _, result, _ in self._waiting]  # waits for the device
        step_s = (time.perf_counter() - self._since) / len(self._waiting)
        shared = {
            "time/step_s": step_s,
            "rate/tokens_per_s": self._tokens_per_step / step_s,
            "mem/peak_gib": peak_memory_gib(self._mesh.device),
        }
        if self._ideal_step_s is not None:
            shared["util/mfu"] = self._ideal_step_s / step_s
        for (step, result, lr), loss in zip(self._waiting, losses, strict=True):
            own = {"loss/train_nats": loss, "optim/lr": lr, "optim/grad_norm": float(result.grad_norm)}
            self._write(step, own | shared)
        step, result, lr = self._waiting[-1]
        if self._mesh.is_main:
            _log.info(self._line(step, sum(losses) / len(losses), lr, float(result.grad_norm), shared))
        self._waiting.clear()
        self.restart_clock()

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        if self._mesh.is_main:
            self._file.close()
            self._board.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        if not self._mesh.is_main:
            return
        tokens = step * self._tokens_per_step
        self._file.write(json.dumps({"step": step, "tokens": tokens} | values) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def _line(self, step: int, loss: float, lr: float, grad_norm: float, shared: dict[str, float]) -> str:
        left = datetime.timedelta(seconds=round((self._run.train.steps - step) * shared["time/step_s"]))
        mfu = f" | mfu {shared['util/mfu']:.0%}" if "util/mfu" in shared else ""
        return (
            f"step {step}/{self._run.train.steps} | loss {loss:.4f} | lr {lr:.2e} | grad {grad_norm:.3f} | "
            f"{shared['rate/tokens_per_s']:,.0f} tokens/s{mfu} | {left} left"
        )


def _reopen(path: Path, start: int) -> TextIO:
    """Open for appending, without the lines of steps that the run will do again."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= start]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a crash cut off
