"""Compiled code: torch.compile fuses the element-wise operations of a function into few kernels."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

from megatron_bipe.errors import ConfigError

T = TypeVar("T")
MAX_SHAPES = 64  # sets of shapes that a function is compiled for


def compile_fused(function: Callable[..., T]) -> Callable[..., T]:
    """Return `function` compiled as one graph, with its backward pass, at its first call for each set of shapes.

    Code for any shape would also run for shapes that have their own, so that a validation of another shape would change
    the kernels of training.

    Raises:
        ConfigError: at a call, if torch cannot compile it on this machine.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # a second, so not at every start
    from torch._functorch import config

    # torch gives up after 8 sets of shapes by default, and each length of a validation is one.
    torch._dynamo.config.recompile_limit = MAX_SHAPES
    config.force_non_lazy_backward_lowering = True  # else backward is compiled in backward, outside of `run`
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    @wraps(function)
    def run(*inputs: Any) -> T:
        try:
            return compiled(*inputs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise ConfigError(
                f"torch.compile failed: {_first_lines(error)}",
                remedy="Set train.compile=off, or install what it needs: a C++ compiler on a CPU, triton and a C "
                "compiler on a GPU",
                location="train.compile",
            ) from error

    return run


def _first_lines(error: Exception) -> str:
    """Return the type and the first two lines of torch's message, without its advice for developers of torch."""
    text = str(error).partition("Set TORCHDYNAMO")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join([f"{type(error).__name__}:", *lines[:2]])
