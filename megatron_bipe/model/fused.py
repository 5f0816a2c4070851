"""Compiled code: torch.compile fuses the element-wise operations of a function into few kernels."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

from megatron_bipe.errors import ConfigError

T = TypeVar("T")


def compile_fused(function: Callable[..., T]) -> Callable[..., T]:
    """Return `function` compiled as one graph, at its first call for each set of shapes.

    Raises:
        ConfigError: at a call, if torch cannot compile it on this machine.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    @wraps(function)
    def run(*inputs: Any) -> T:
        try:
            return compiled(*inputs)
        except TorchDynamoException as error:
            raise ConfigError(
                f"torch.compile failed: {_first_line(error)}",
                remedy="Set train.compile=off, which computes the same without compilation; on a CPU it needs a C++ "
                "compiler, on a GPU triton and a C compiler",
                location="train.compile",
            ) from error

    return run


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
