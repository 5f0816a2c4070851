"""Positions of encodings that know no segments: the place in the window, or one drawn for it.

B batch · T positions
"""

import torch
from torch import Tensor

# Multipliers of splitmix64 (Steele et al. 2014) as int64.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIXERS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))


def token_position_ids(tokens_BT: Tensor) -> Tensor:
    """0, 1, 2, ... in every window, int64 [B, T]."""
    places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    return places_T.expand_as(tokens_BT).contiguous()  # pipeline stages send no views


def random_position_ids(tokens_BT: Tensor, below: int, seed: int) -> Tensor:
    """A random set of places below `below` for each window, in ascending order, int64 [B, T].

    It follows from the window's tokens and the seed: the same on every rank, in any layout, and after resumption. A
    window that comes again in a later epoch gets the same places again.

    Source: Ruoss et al. 2023 (arXiv 2305.16843), section 3.
    """
    num_tokens, device = tokens_BT.shape[1], tokens_BT.device
    steps = torch.arange(1, max(num_tokens, below) + 1, device=device) * _GOLDEN
    of_window_B1 = _mixed(tokens_BT + steps[:num_tokens]).sum(dim=1, keepdim=True) + _mixed(steps[:1] + seed)
    # Each place gets a number of its own in every window, for mixing is one to one; those with the lowest are drawn.
    return _mixed(of_window_B1 + steps[:below]).argsort(dim=1)[:, :num_tokens].sort(dim=1).values


def evenly_spaced_position_ids(tokens_BT: Tensor, below: int, trained_tokens: int) -> Tensor:
    """Places as far apart as drawn ones are on average, int64 [B, T]: for everything but training.

    The stride is that of the training length, and of the window where it is longer, so that all lie below `below`.
    """
    return token_position_ids(tokens_BT) * below // max(tokens_BT.shape[1], trained_tokens)


def _mixed(x: Tensor) -> Tensor:
    for shift, factor in _MIXERS:
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor  # the shift of an int64 would bring in its sign
    return x
