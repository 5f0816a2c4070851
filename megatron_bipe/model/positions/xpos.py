"""XPOS: RoPE whose scores fade with distance.

B batch · T positions · H head width
"""

import torch
from torch import Tensor

from megatron_bipe.model.positions.rotary import Rotary, Tables

DECAY_POSITIONS = 512  # over these, pair i fades by the factor zeta_i; as published
_GAMMA = 0.4  # as published: zeta of pair i is (2 i / H + gamma) / (1 + gamma), from 0.29 to almost 1


class Xpos(Rotary):
    """Rotated queries times zeta^(position/512), keys times its inverse: scores fade by zeta^(distance/512).

    Powers count from the middle of the training length, which cancels in every score; no other centre would let cached
    keys stay. In windows of up to 16,384 tokens (the limit in config/encodings.py) they lie within e^-40 and e^40, so
    that bf16 and fp32 (e^88) have room for queries, keys and gradients. fp16 (e^11) ends about 4,500 positions from the
    middle.

    Blockwise attention, which its authors evaluate with, is no part of it here.

    Source: Sun et al. 2022 (arXiv 2212.10554).
    """

    def prepare(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tables, Tables]:
        """Cosines and sines, times the power of the query, and times that of the key."""
        head_width = self.config.head_width
        zetas_H = (torch.arange(0, head_width, 2, device=positions_BT.device) / head_width + _GAMMA) / (1 + _GAMMA)
        powers_BT = (positions_BT - self.config.train_len_tokens // 2).float() / DECAY_POSITIONS
        logs_B1TH = (powers_BT[..., None] * zetas_H.log()).unsqueeze(1)
        cos_B1TH, sin_B1TH = self.angles(positions_BT)
        grown_B1TH, shrunk_B1TH = logs_B1TH.exp(), logs_B1TH.neg().exp()
        for_queries = (cos_B1TH * grown_B1TH).to(dtype), (sin_B1TH * grown_B1TH).to(dtype)
        return for_queries, ((cos_B1TH * shrunk_B1TH).to(dtype), (sin_B1TH * shrunk_B1TH).to(dtype))

    @staticmethod
    def table_width(head_width: int) -> int:
        """A cosine and a sine for each pair of queries, and of keys."""
        return 2 * head_width
