"""Faults that tests inject into a rank: in its arithmetic for some samples, or in its process at some location.

    python -m tests.helpers.faults ARGUMENTS...

is pretrain.py with these arguments; the environment variable FAULT holds the `ProcessFault` of the launch as JSON.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pretrain
from megatron_bipe.engine import engines
from megatron_bipe.runtime import watchdog
from megatron_bipe.runtime.exit_handling import run_rank
from megatron_bipe.train.batch_loader import BatchLoader

FAULT = "FAULT"


class Arithmetic:
    """Current arithmetic fault of this rank; by default none."""

    loss_factor = 1.0
    loss_offset = 0.0  # changes the loss and not its gradient
    gradient_factor = 1.0

    @classmethod
    def reset(cls) -> None:
        """Remove the fault."""
        cls.loss_factor, cls.loss_offset, cls.gradient_factor = 1.0, 0.0, 1.0


def expose(engine: Any) -> None:
    """Let `Arithmetic` change the loss and the gradient of this rank's part of the model, from now on."""
    if not hasattr(engines.mean_loss, "is_exposed"):
        engines.mean_loss, engines.mean_loss = (
            _exposed(engines.mean_loss),
            _exposed(engines.mean_loss),
        )
    last = list(engine._engine.module.children())[-1]
    last.register_forward_hook(_hook_output)


def spoil_weight(engine: Any) -> None:
    """Set one element of the compute weights to NaN: of the last matrix, whose every element reaches the loss."""
    weight = [p for p in engine._engine.module.parameters() if p.ndim > 1][-1]
    weight.data.view(-1)[5] = torch.nan


def _exposed(mean_loss: Any) -> Any:
    def exposed(losses_BT: Tensor, *weights: Tensor | None) -> Tensor:
        return mean_loss(losses_BT * Arithmetic.loss_factor + Arithmetic.loss_offset, *weights)

    exposed.is_exposed = True  # type: ignore[attr-defined]
    return exposed


def _hook_output(module: Any, inputs: Any, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) else output
    if first.requires_grad:
        first.register_hook(lambda gradient: gradient * Arithmetic.gradient_factor)


class SampleFault(NamedTuple):
    """Arithmetic fault of a rank in the steps that start with the samples `first` to `stop`."""

    kind: str  # "loss": NaN; "spike": a loss 20 times as high; "gradient": NaN; "weight": NaN
    rank: int
    first: int
    stop: int
    once: bool = False


class FaultyBatchLoader(BatchLoader):
    """Batch loader that injects a fault and records the requested tokens."""

    fault: SampleFault | None = None
    engine: Any = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.read: dict[int, list[list[int]]] = {}  # by first sample of the step: this rank's tokens
        self._is_injected = False

    def train_batches(self, first_sample: int) -> Iterator[Any]:
        Arithmetic.reset()
        fault = self.fault
        if fault and self._mesh.rank == fault.rank and fault.first <= first_sample < fault.stop:
            if not (fault.once and self._is_injected):
                self._inject(fault.kind)
            self._is_injected = True
        self.read[first_sample] = []
        for batch in super().train_batches(first_sample):
            self.read[first_sample].append(batch.tokens_BT.tolist())
            yield batch

    def _inject(self, kind: str) -> None:
        if kind == "weight":
            spoil_weight(self.engine)
        elif kind == "gradient":
            Arithmetic.gradient_factor = torch.nan
        else:
            Arithmetic.loss_factor = {"loss": torch.nan, "spike": 20.0}[kind]


class ProcessFault(NamedTuple):
    """Fault of a rank's process when it reaches a location for the `count`-th time."""

    kind: str  # "raise", "spin", or the name of a signal
    rank: int
    location: str  # those of the watchdog; "loading" also means the first step if there is nothing to load
    count: int = 1
    delay_s: float = 0.0  # of a signal
    record: str = ""  # a file to which a line is added when a signal is sent

    @property
    def variables(self) -> dict[str, str]:
        """Return the environment of a launch with this fault."""
        return {FAULT: json.dumps(self)}


class FaultyWatchdog(watchdog.Watchdog):
    """Watchdog that injects the launch's fault."""

    _count = 0

    def mark(self, location: str) -> None:
        super().mark(location)
        fault = ProcessFault(*json.loads(os.environ[FAULT]))
        if self._mesh.rank != fault.rank:
            return
        if location.startswith(fault.location) or (fault.location == "loading" and location.startswith("step")):
            self._count += 1
            if self._count == fault.count:
                self._inject(fault)

    def _inject(self, fault: ProcessFault) -> None:
        if fault.kind == "raise":
            raise ValueError("an injected fault")
        if fault.kind == "spin":
            spin()
        threading.Timer(fault.delay_s, self._send, (fault,)).start()

    def _send(self, fault: ProcessFault) -> None:
        if fault.record:
            with Path(fault.record).open("a") as file:
                sent = {"signal": fault.kind, "location": fault.location, "in": self._location, "rank": fault.rank}
                file.write(json.dumps(sent) + "\n")
        os.kill(os.getpid(), signal.Signals[fault.kind])


def spin() -> None:
    """Never return."""
    while True:
        pass


def faulty_pretrain(arguments: list[str]) -> None:
    """Run pretrain.py on a rank, with the fault that the environment names, if any."""
    if FAULT in os.environ:
        watchdog.Watchdog = FaultyWatchdog  # type: ignore[misc]
    run_rank(pretrain.main, pretrain.parse_args(arguments))


if __name__ == "__main__":
    faulty_pretrain(sys.argv[1:])
