"""xPos: RoPE whose scores decay with distance.

B batch · T positions · H head width
"""

import torch
from torch import Tensor

from megatron_bipe.model.positions.functional import xpos_factors
from megatron_bipe.model.positions.rotary import Rotary, Tables


class Xpos(Rotary):
    """Rotary queries times zeta^(position/512), keys times its inverse: scores decay by zeta^(distance/512).

    Exponents are relative to the middle of the training length, an offset that cancels in every score; a fixed offset
    keeps cached keys valid. In sequences of up to 16,384 tokens (the limit in config/encodings.py) the factors are
    between e^-40 and e^40, which leaves room in bf16 and fp32 (e^88) for queries, keys and gradients. fp16 (e^11)
    overflows about 4,500 positions from the middle. Blockwise attention, which its authors evaluate with, is not
    implemented.

    Source: Sun et al. 2022 (arXiv 2212.10554).
    """

    def prepare(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tables, Tables]:
        """Return cosines and sines times the factor of queries, and times that of keys."""
        growing_B1TH, fading_B1TH = xpos_factors(positions_BT, self.config.head_width, self.config.train_len_tokens)
        cos_B1TH, sin_B1TH = self.angles(positions_BT)
        for_queries = (cos_B1TH * growing_B1TH).to(dtype), (sin_B1TH * growing_B1TH).to(dtype)
        return for_queries, ((cos_B1TH * fading_B1TH).to(dtype), (sin_B1TH * fading_B1TH).to(dtype))

    @staticmethod
    def prepared_width(head_width: int) -> int:
        """Return a cosine and a sine per pair, for queries and for keys."""
        return 2 * head_width
