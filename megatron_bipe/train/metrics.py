"""Metrics of a run: metrics.jsonl (every step), TensorBoard, and progress lines in the log."""

import datetime
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_bipe.config import RunConfig
from megatron_bipe.engine.interface import StepResult
from megatron_bipe.model import train_flops_per_token
from megatron_bipe.parallel import Mesh
from megatron_bipe.run_files import METRICS, TIME
from megatron_bipe.runtime.hardware import device_name, peak_memory_gib
from megatron_bipe.train.metrics_file import STEP_TIME, VALID_LOSS, VALID_PERPLEXITY, MetricsFile, ValidValue, valid_key
from megatron_bipe.train.rollback import Reading
from megatron_bipe.train.tensorboard_file import Board
from megatron_bipe.train.trackers import History, Sink
from megatron_bipe.train.train_state import Samples, TrainState
from megatron_bipe.train.validation import ValidResult, main_result

_log = logging.getLogger(__name__)


class Metrics:
    """Writer of metrics; only the main rank writes.

    Reading a loss waits for the device, so step results are kept as tensors until `flush`.

    Args:
        run: the run configuration.
        mesh: this rank.
        start: training state at the start; later lines of an earlier attempt are dropped.
        peak_flops: peak FLOP/s of one rank, None if unknown.
        began_at_s: `time.time` of the first start of the run; None: now.
    """

    def __init__(
        self, run: RunConfig, mesh: Mesh, start: TrainState, peak_flops: float | None, began_at_s: float | None = None
    ) -> None:
        self._run, self._mesh = run, mesh
        self._pending: list[tuple[int, Samples, StepResult, float]] = []
        tokens = run.train.global_batch * run.train.seq_len_tokens
        self._tokens_per_step = tokens
        flops = train_flops_per_token(run.model, run.train.seq_len_tokens) * tokens
        self._ideal_step_s = flops / (peak_flops * mesh.num_ranks) if peak_flops else None
        self._warned_of_mfu = False
        self._began_at_s = time.time() if began_at_s is None else began_at_s
        self._board = Board(run.run_dir / "tensorboard") if mesh.is_main else None
        self._sinks: list[Sink] = [] if self._board is None else [self._board]
        self._open(start)

    def attach(self, sink: Sink) -> None:
        """Send all lines to a further sink, earlier ones included; call it on the main rank."""
        sink.begin(self._history)
        self._sinks.append(sink)

    def step(self, step: int, samples: Samples, result: StepResult, lr: float) -> None:
        """Record the result of update `step` (from 1)."""
        self._pending.append((step, samples, result, lr))

    def valid(self, step: int, results: Sequence[ValidResult]) -> None:
        """Write the results of all validations after update `step`; their time does not count as training time."""
        main = main_result(results, self._run.train.seq_len_tokens)
        values: dict[str, Any] = {VALID_LOSS: main.nats, VALID_PERPLEXITY: main.perplexity}
        for each in results:
            own: dict[ValidValue, Any] = {"nats": each.nats, "perplexity": each.perplexity}
            own |= {} if each.bits_per_byte is None else {"bits_per_byte": each.bits_per_byte}
            own["nats_by_position"] = each.nats_by_position
            values |= {valid_key(each.name, each.length_tokens, kind): value for kind, value in own.items()}
        self._write(step, values)
        if self._mesh.is_main:
            others = [each for each in results if each.name == main.name and each is not main]
            parts = [f"perplexity {main.perplexity:.2f}", *(f"{x.perplexity:.2f} at {x.length_tokens}" for x in others)]
            _log.info("step %d | validation loss %.4f | %s", step, main.nats, ", ".join(parts))
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last step from the step times."""
        self._since = time.perf_counter()

    def flush(self) -> list[Reading]:
        """Write all pending steps, with their mean time, and return their readings."""
        if not self._pending:
            return []
        readings = [
            Reading(step, samples, float(result.loss_nats), float(result.grad_norm))  # waits for the device
            for step, samples, result, _ in self._pending
        ]
        step_s = (time.perf_counter() - self._since) / len(self._pending)
        shared = {
            STEP_TIME: step_s,
            "rate/tokens_per_s": self._tokens_per_step / step_s,
            "mem/peak_gib": peak_memory_gib(self._mesh.device),
        }
        if self._ideal_step_s is not None:
            shared["util/mfu"] = self._ideal_step_s / step_s
            self._check_mfu(shared["util/mfu"])
        if self._mesh.is_main:
            shared["run/goodput"] = self.goodput(len(readings) * step_s)
        for reading, (*_, lr) in zip(readings, self._pending, strict=True):
            own = {
                "loss/train_nats": reading.loss_nats,
                "optim/lr": lr,
                "optim/grad_norm": reading.grad_norm,
                "data/samples": reading.samples[1],
            }
            self._write(reading.step, own | shared)
        if self._mesh.is_main:
            _log.info(self._progress_line(readings, self._pending[-1][-1], shared))
        self._pending.clear()
        self.restart_clock()
        return readings

    def goodput(self, further_s: float = 0.0) -> float:
        """Return the time of all kept steps over the time since the first start of the run; main rank only.

        Args:
            further_s: seconds of steps that are not written yet.
        """
        return (self._file.step_time_s + further_s) / max(time.time() - self._began_at_s, 1e-9)

    def sync(self) -> None:
        """Sync all lines to disk; call it before a checkpoint, after which its steps are not repeated."""
        if self._board is not None:
            self._file.sync()
            self._board.sync()

    def drop_after(self, start: TrainState) -> None:
        """Drop all metrics after `start`; those steps are repeated with other samples."""
        self._pending.clear()
        if self._mesh.is_main:
            self._file.close()
        self._open(start)

    def close(self) -> None:
        """Write pending steps and close the files."""
        self.flush()
        if self._mesh.is_main:
            self._file.close()
        for sink in self._sinks:
            sink.close()

    def _open(self, start: TrainState) -> None:
        self.restart_clock()
        if self._mesh.is_main:
            path = self._run.run_dir / METRICS
            self._file = MetricsFile(path, start.step, start.valid_owed)
            last_lines = [line for line in self._file.last_lines if line["step"] == start.step]
            self._history = History(path, start.step, self._file.size_bytes, last_lines)
            for sink in self._sinks:
                sink.begin(self._history)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._mesh.is_main:
            line = {"step": step, "tokens": step * self._tokens_per_step, TIME: time.time(), **values}
            self._file.add(line)
            for sink in self._sinks:
                sink.write([line])

    def _check_mfu(self, mfu: float) -> None:
        """Warn once if the MFU exceeds 1, which is impossible."""
        if mfu > 1 and self._mesh.is_main and not self._warned_of_mfu:
            self._warned_of_mfu = True
            _log.warning(
                "MFU of %.0f%%: the peak of %s in megatron_bipe/runtime/hardware.py is too low; please report it",
                *(100 * mfu, device_name(self._mesh.device)),
            )

    def _progress_line(self, readings: list[Reading], lr: float, shared: dict[str, float]) -> str:
        step, total = readings[-1].step, self._run.train.steps
        loss = sum(reading.loss_nats for reading in readings) / len(readings)
        left = datetime.timedelta(seconds=round((total - step) * shared[STEP_TIME]))
        mfu = f" | mfu {shared['util/mfu']:.0%}" if "util/mfu" in shared else ""
        return (
            f"step {step}/{total} | loss {loss:.4f} | lr {lr:.2e} | grad {readings[-1].grad_norm:.3f} | "
            f"{shared['rate/tokens_per_s']:,.0f} tokens/s{mfu} | {left} left"
        )
