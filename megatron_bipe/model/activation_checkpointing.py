"""Activation checkpointing: recompute activations in backward instead of storing them."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]

# "selective" keeps the outputs of matrix products, attention and collectives; the rest is cheap to recompute.
_KEPT_NAMES = (
    "aten.mm",
    "aten.addmm",
    "aten.bmm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "_c10d_functional.all_reduce",
    "_c10d_functional.all_gather_into_tensor",
    "_c10d_functional.reduce_scatter_tensor",
    "_c10d_functional.all_to_all_single",
)


def checkpoint_activations(function: Callable[..., Tensor], what: Recompute) -> Callable[..., Tensor]:
    """Wrap `function` so that backward recomputes the activations selected by `what`.

    The recomputed activations have the same bits. Gradients have, too, except on a GPU without `train.deterministic`,
    where the sum over keys in the backward pass of attention is taken in a varying order.
    """
    if what == "none":
        return function
    contexts: dict[str, Any] = {}
    if what == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def run(*inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*inputs)
        # A block draws no random numbers, so there is no RNG state to restore.
        result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts)
        return result

    return run


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    is_kept = str(operator.overloadpacket) in _KEPT_NAMES
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
