"""RoPE.

B batch · T positions · N heads · H head width
"""

import torch
from torch import Tensor

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory
from megatron_bipe.model.positions.base import RelativeEncoding
from megatron_bipe.model.positions.rope_scaling import rotary_frequencies

Tables = tuple[Tensor, Tensor]  # cosines and sines [B, 1, T, H/2]


class Rotary(RelativeEncoding):
    """Pairs (i, i + H/2) of queries and keys are rotated by position x frequency i: the half-rotation layout.

    Source: Su et al. 2021 (arXiv 2104.09864).
    """

    encodes = True

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        del layers
        self.config = config

    def prepare(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tables, Tables]:
        """Cosines and sines for queries, and for keys: here the same ones."""
        cos_B1TH, sin_B1TH = self.angles(positions_BT)
        tables = cos_B1TH.to(dtype), sin_B1TH.to(dtype)
        return tables, tables

    def angles(self, positions_BT: Tensor) -> Tables:
        """Cosines and sines in fp32, times the attention factor of the scaling."""
        frequencies_H, factor = rotary_frequencies(self.config, positions_BT.shape[-1])
        angles_BTH = positions_BT.to(torch.float32)[..., None] * frequencies_H.to(positions_BT.device)
        cos_B1TH, sin_B1TH = angles_BTH.unsqueeze(1).cos(), angles_BTH.unsqueeze(1).sin()
        return (cos_B1TH, sin_B1TH) if factor == 1.0 else (cos_B1TH * factor, sin_B1TH * factor)

    def encode(self, q_BNTH: Tensor, k_BNTH: Tensor, prepared: tuple[Tables, Tables]) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys."""
        for_queries, for_keys = prepared
        return _rotate(q_BNTH, *for_queries), _rotate(k_BNTH, *for_keys)

    @staticmethod
    def table_width(head_width: int) -> int:
        """A cosine and a sine for each pair."""
        return head_width


def _rotate(x_BNTH: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor) -> Tensor:
    first, second = x_BNTH.chunk(2, dim=-1)
    return torch.cat((first * cos_B1TH - second * sin_B1TH, second * cos_B1TH + first * sin_B1TH), dim=-1)
