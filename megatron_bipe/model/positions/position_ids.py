"""Positions of encodings without segments: the position in the sequence, or randomized ones.

B batch · T positions
"""

import torch
from torch import Tensor

# Multipliers of splitmix64 (Steele et al. 2014) as int64.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIXERS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))


def token_position_ids(tokens_BT: Tensor) -> Tensor:
    """Return 0, 1, 2, ... for every sequence, int64 [B, T]."""
    positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    return positions_T.expand_as(tokens_BT).contiguous()  # pipeline stages cannot send views


def random_position_ids(tokens_BT: Tensor, below: int, seed: int) -> Tensor:
    """Draw a random set of positions smaller than `below` for each sequence, in ascending order, int64 [B, T].

    The set is a function of the sequence's tokens and the seed: it is the same on every rank, in any layout and after a
    resume, and each time that the sequence recurs in a later epoch.

    Source: Ruoss et al. 2023 (arXiv 2305.16843), section 3.
    """
    num_tokens, device = tokens_BT.shape[1], tokens_BT.device
    steps = torch.arange(1, max(num_tokens, below) + 1, device=device) * _GOLDEN
    hash_B1 = _mixed(tokens_BT + steps[:num_tokens]).sum(dim=1, keepdim=True) + _mixed(steps[:1] + seed)
    # Mixing is bijective, so each position gets a distinct hash in a sequence; the lowest hashes are drawn.
    return _mixed(hash_B1 + steps[:below]).argsort(dim=1)[:, :num_tokens].sort(dim=1).values


def evenly_spaced_position_ids(tokens_BT: Tensor, below: int, trained_tokens: int) -> Tensor:
    """Return positions with the average spacing of random ones, int64 [B, T], for everything but training.

    The spacing is that of the training length, or of the sequence if it is longer, so that all positions are smaller
    than `below`.
    """
    return token_position_ids(tokens_BT) * below // max(tokens_BT.shape[1], trained_tokens)


def _mixed(x: Tensor) -> Tensor:
    for shift, factor in _MIXERS:
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor  # masked: >> of an int64 extends the sign
    return x
