"""Measures the compute time of a rank, to distinguish a slow rank from those that wait for it.

All ranks finish a step together, whichever was slow. The forward pass of a data-parallel rank or of a stage waits for
no other rank; with tensor parallelism or ZeRO 3 it waits within its group, which is then slow as a unit.
"""

import time
from typing import Any

import torch
from torch import nn


class ForwardTimer:
    """Sum of the durations of a module's forward passes.

    Args:
        module: module to time; it gets hooks.
        device: device of the module. A GPU is timed by events, so that only `take_s` waits for it.
        wanted: False disables the timer.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, wanted: bool) -> None:
        self._on_gpu = device.type == "cuda"
        self._passes: list[tuple[Any, Any]] = []  # begin and end, as events or seconds
        self._began: Any = None
        if wanted:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def pop_seconds(self) -> float:
        """Return the seconds since the last call and reset the sum."""
        passes, self._passes = self._passes, []
        if not self._on_gpu:
            return float(sum(end - begin for begin, end in passes))
        torch.cuda.synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in passes)) / 1000

    def _begin(self, *_: Any) -> None:
        self._began = self._now()

    def _end(self, *_: Any) -> None:
        self._passes.append((self._began, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
