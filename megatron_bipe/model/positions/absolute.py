"""Position ids of models without segments, and absolute encodings: a term of the residual stream from position ids.

B batch · T positions (t: of this rank) · D width
"""

import torch
from torch import Tensor, nn

from megatron_bipe.config import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory
from megatron_bipe.model.positions.functional import sinusoids


def learned(config: ModelConfig, layers: LayerFactory) -> nn.Module:
    """Make a learned embedding of positions: in the segment for BiPE, else in the sequence (Gehring et al. 2017)."""
    assert config.embedding_rows is not None
    return layers.replicated_embedding(config.embedding_rows, config.hidden_size, -1 if config.zero_last_row else None)


class Sinusoidal(nn.Module):
    """Sines and cosines of positions of any size, at wavelengths from 2 pi to 10000 x 2 pi.

    They are scaled by the initial standard deviation of the token embedding. This keeps the published proportion
    between the two: the authors add sines to token embeddings of standard deviation 1.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5; sines in the first half of the width.
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self._width, self._scale, self._own = config.hidden_size, config.init_std, layers.local_sequence_ids

    def forward(self, positions_Bt: Tensor) -> Tensor:
        """Map positions [B, t] to fp32 [B, t, D], computed in fp32."""
        return sinusoids(self._own(positions_Bt), self._width) * self._scale


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
