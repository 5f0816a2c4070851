"""Counts where an update would wait for a GPU, on a machine without one.

DeepSpeed's accelerator gets streams and events that count, instead of none, and reports that its device works in the
background. All tensors are on the CPU, so reads of those that would be in host memory on a GPU, as with offload, count,
too, and copies from tensors in host memory (`Tensor.to`) do not.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Waits = Counter[str]  # number by kind: synchronize, read, from host
_READS = ("tolist", "numpy", "cpu")


class _Reads(TorchDispatchMode):
    """Counts what needs the value of a tensor: `item`, `bool`, `float`, `nonzero`, masks as an index."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self._waits["read"] += 1
        return func(*args, **(kwargs or {}))


class _Property:
    """A property of the accelerator with a fixed value."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __get__(self, *_: object) -> Any:
        return self._value


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


@contextmanager
def background_device() -> Iterator[Waits]:
    """Let DeepSpeed take the CPU for a GPU from its start on; yield the counts, to clear before what is measured."""
    from deepspeed.accelerator import get_accelerator

    waits: Waits = Counter()

    def count(kind: str, call: Any = lambda *_, **__: None) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            waits[kind] += 1
            return call(*args, **kwargs)

        return counted

    class Stream:  # an Event, too
        def __init__(self, **_: Any) -> None:
            self.synchronize = count("synchronize")

        def nothing(self, *_: Any) -> None: ...

        wait_stream = wait_event = wait = record = nothing

        def record_event(self, *_: Any) -> "Stream":
            return Stream()

        def query(self) -> bool:
            return True

    accelerator = type(get_accelerator())
    values = {
        "is_synchronized_device": _always(False),
        "resolves_data_dependency": _always(False),
        "handles_memory_backpressure": _always(False),
        "use_host_timers": _always(True),
        "synchronize": count("synchronize"),
        "Stream": _Property(Stream),
        "Event": _Property(Stream),
        "stream": _always(nullcontext()),
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "FloatTensor": _Property(count("from host", torch.FloatTensor)),
        "ByteTensor": _Property(count("from host", torch.ByteTensor)),
    }
    make = torch.tensor

    def counted_tensor(*args: Any, **kwargs: Any) -> Tensor:
        waits["from host"] += "device" in kwargs
        return make(*args, **kwargs)

    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch.object(accelerator, name, value))
        for name in _READS:
            stack.enter_context(mock.patch.object(Tensor, name, count("read", getattr(Tensor, name))))
        stack.enter_context(mock.patch.object(Tensor, "record_stream"))
        stack.enter_context(mock.patch.object(torch, "tensor", counted_tensor))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", count("synchronize")))
        stack.enter_context(_Reads(waits))
        yield waits
