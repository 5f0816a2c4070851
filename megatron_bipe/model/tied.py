"""A tied output: the head projects to the vocabulary with the token table.

Where one rank has both layers there is one parameter. Where the head is on a stage of its own there is a copy, which
begins as the table does and is given the same gradient, the sum of both, at every update; it is no parameter of the
model: checkpoints, the gradient norm and counts leave it out.
"""

from typing import Any

import torch
from torch import Tensor

TOKEN_TABLE = "0.token.weight"  # its name in the plan


def tie(head: Any, embedding: Any) -> None:
    """Let both layers have one parameter."""
    head.output.weight = embedding.token.weight


def tie_to_copy(head: Any, embedding: Any) -> None:
    """Let the head begin with a copy of the table."""
    with torch.no_grad():
        head.output.weight.copy_(embedding.token.weight)
    head.output.weight.copy_of = TOKEN_TABLE


def copied(parameter: Tensor) -> str | None:
    """Name in the plan of the parameter that this one is a copy of; None: it is one of the model's own."""
    name: str | None = getattr(parameter, "copy_of", None)
    return name
