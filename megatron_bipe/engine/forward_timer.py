"""How long a rank computes by itself, by which a slow one is told from those that wait for it.

Ranks leave a step together, whoever was slow. A forward pass of data-parallel ranks or of a stage waits for no one;
that of tensor-parallel ranks and of ZeRO 3 waits within their group, which is then slow as a whole.
"""

import time
from typing import Any

import torch
from torch import nn


class ForwardTimer:
    """Adds up the time of a module's forward passes.

    Args:
        module: whose; it gets hooks.
        device: where it computes. On a GPU time is taken by events, so that nothing waits before `take_s`.
        wanted: whether anyone will ask; otherwise nothing is kept.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, wanted: bool) -> None:
        self._on_gpu = device.type == "cuda"
        self._passes: list[tuple[Any, Any]] = []  # begin and end: events, or seconds
        self._began: Any = None
        if wanted:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def take_s(self) -> float:
        """Seconds since the last call of this."""
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
