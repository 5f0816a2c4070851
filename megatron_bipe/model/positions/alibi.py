"""ALiBi.

B batch · T positions · N query heads · G key/value heads · H head width
"""

import math

import torch
from torch import Tensor

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory, local_heads
from megatron_bipe.model.positions.base import RelativeEncoding
from megatron_bipe.model.positions.functional import (
    BILEVEL_ALIBI_FACTOR,
    alibi_key_channels,
    alibi_query_channels,
    alibi_slopes,
    interleave_zeros,
)

_CHANNELS = 7


class KeyBias(RelativeEncoding):
    """ALiBi as channels of queries and keys, so that attention itself needs no bias.

    Softmax ignores what is constant along the keys, so slope x (key position - query position) may be
    replaced by slope x (key position - last position): a product of something the head knows and something
    the key knows, that is a few more channels in the dot product. bf16 holds 8 significant bits, so the
    slope goes in three parts (24 bits) and the position in two exact ones (up to 65,536, the limit in
    config/encodings.py): 6 channels. A seventh is the query's
    and takes off what its own position gives, so that scores near the query stay small; how it is rounded
    does not matter, since it is the same for all keys. The channels come before the head's own and the largest come
    first: kernels add in that order, and the large numbers have cancelled before anything small is added. A zero
    follows each channel: AMX adds up even and odd channels apart (TDPBF16PS in Intel's manual), and numbers that
    cancel must meet in one of the sums. Queries hold the slopes, so keys stay shared by grouped queries.
    """

    encodes = True

    def __init__(self, slopes_N: Tensor, head_width: int) -> None:
        # Attention multiplies scores by 1/sqrt(H); the bias must come through unscaled.
        self.slopes_N = slopes_N.to(torch.float32) * math.sqrt(head_width)

    def prepare(self, positions_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """The channels of keys [B, 1, T, 7]."""
        back_BT = positions_BT[:, -1:] - positions_BT  # segments or tokens before the last key, >= 0
        return alibi_key_channels(back_BT).to(dtype)[:, None]

    def encode(self, q_BNTH: Tensor, k_BGTH: Tensor, prepared: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after the bias channels, the width filled up by zeros."""
        slopes_N1 = self.slopes_N.to(q_BNTH.device)[:, None]
        back_B1T = -(prepared[..., 0].float() + prepared[..., 2].float())
        q_BNT7 = alibi_query_channels(slopes_N1, back_B1T)
        pad = self.widening(q_BNTH.shape[-1]) - 2 * _CHANNELS
        return _prepend(q_BNT7, q_BNTH, pad), _prepend(prepared, k_BGTH, pad)

    def reach(self, q_BNTH: Tensor, k_BGTH: Tensor) -> Tensor:
        """Where a key's weight against the query's own is at most 2^-24 / T, whatever the two products.

        A query's own key has no bias. Another key's score is higher by at most |q| times the longest key, less the
        query's own product, all over sqrt(H); slope x distance takes off more than that and 24 ln 2 + ln T beyond
        the reach. 1 is added for rounding.
        """
        num_tokens, root = q_BNTH.shape[2], math.sqrt(q_BNTH.shape[-1])
        q_BGRTH, k_BG1TH = q_BNTH.float().unflatten(1, (k_BGTH.shape[1], -1)), k_BGTH.float()[:, :, None]
        longest_BG11 = k_BG1TH.norm(dim=-1).amax(dim=-1, keepdim=True)
        higher_BGRT = q_BGRTH.norm(dim=-1) * longest_BG11 - (q_BGRTH * k_BG1TH).sum(dim=-1)
        higher_N = higher_BGRT.amax(dim=(0, 3)).flatten() / root
        return (higher_N + 24 * math.log(2) + math.log(num_tokens) + 1) * root / self.slopes_N.to(q_BNTH.device)

    @staticmethod
    def widening(head_width: int) -> int:
        """The channels with their zeros, and what fills the width up to a multiple of 8."""
        return 2 * _CHANNELS + -(head_width + 2 * _CHANNELS) % 8

    @staticmethod
    def table_width(head_width: int) -> int:
        """The channels of a key, which all heads share."""
        del head_width
        return _CHANNELS


class Alibi(KeyBias):
    """ALiBi on places in the window; on segment counts with slopes 96 times as steep."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        factor = BILEVEL_ALIBI_FACTOR if config.bilevel else 1.0
        slopes = alibi_slopes(config.num_heads)[local_heads(config.num_heads, layers)]
        # Constants of weights that are yet to be read are no weights: layers on the meta device get them, too.
        super().__init__(torch.tensor(slopes, device="cpu") * factor, config.head_width)


def _prepend(channels_BNTC: Tensor, x_BNTH: Tensor, pad: int) -> Tensor:
    channels_BNTC = interleave_zeros(channels_BNTC).to(x_BNTH.dtype).expand(*x_BNTH.shape[:-1], -1)
    return torch.nn.functional.pad(torch.cat((channels_BNTC, x_BNTH), dim=-1), (0, pad))
