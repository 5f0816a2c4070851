"""Faults in the arithmetic of a rank: of its loss, of its gradient, of its weights."""

from typing import Any

import torch
from torch import Tensor

from megatron_bipe.engine import pipeline, zero


class Planted:
    """What is wrong at the moment; by default nothing."""

    loss_factor = 1.0
    loss_offset = 0.0  # changes the loss and not its gradient
    gradient_factor = 1.0

    @classmethod
    def nothing(cls) -> None:
        """Heal all."""
        cls.loss_factor, cls.loss_offset, cls.gradient_factor = 1.0, 0.0, 1.0


def plant(engine: Any) -> None:
    """Let `Planted` reach the loss and the gradient of this rank's part of the model, from now on."""
    if not hasattr(zero.mean_loss, "planted"):
        zero.mean_loss, pipeline.mean_loss = _planted(zero.mean_loss), _planted(pipeline.mean_loss)
    last = list(engine._engine.module.children())[-1]
    last.register_forward_hook(_hook_output)


def spoil_weight(engine: Any) -> None:
    """One element of the compute weights becomes NaN: of the last matrix, whose every element reaches the loss."""
    weight = [p for p in engine._engine.module.parameters() if p.ndim > 1][-1]
    weight.data.view(-1)[5] = torch.nan


def _planted(mean_loss: Any) -> Any:
    def planted(losses_BT: Tensor, *weights: Tensor | None) -> Tensor:
        return mean_loss(losses_BT * Planted.loss_factor + Planted.loss_offset, *weights)

    planted.planted = True  # type: ignore[attr-defined]
    return planted


def _hook_output(module: Any, inputs: Any, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) else output
    if first.requires_grad:
        first.register_hook(lambda gradient: gradient * Planted.gradient_factor)
