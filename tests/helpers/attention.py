"""Calls of one attention layer."""

from torch import Tensor

from megatron_bipe.model.attention import Attention


def attend(layer: Attention, hidden_BTD: Tensor, positions_BT: Tensor) -> Tensor:
    """Return the output of the layer for these positions."""
    result: Tensor = layer(hidden_BTD, positions_BT, layer.prepare(positions_BT, hidden_BTD.dtype))
    return result
