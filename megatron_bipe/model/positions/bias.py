"""Relative encodings that add a bias to attention scores: ALiBi and T5.

B batch · T positions · N query heads (n: of this rank) · G key/value heads · H head width
"""

import math

import torch
from torch import Tensor, nn

from megatron_bipe.config import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory, local_heads
from megatron_bipe.model.positions.base import DeviceCopies, RelativeEncoding
from megatron_bipe.model.positions.functional import (
    BIAS_CHANNELS,
    BILEVEL_ALIBI_FACTOR,
    NUM_T5_BUCKETS,
    alibi_key_channels,
    alibi_query_channels,
    alibi_slopes,
    spread_channels,
    t5_buckets,
)


class KeyBias(RelativeEncoding):
    """ALiBi as extra channels of queries and keys, so that attention needs no score bias.

    Softmax ignores terms that are constant along the keys, so slope x (key position - query position) may be replaced
    by slope x (key position - last position). That is a product of a value of the head and a value of the key, and
    hence a few more channels in the dot product. bf16 holds 8 significant bits, so the slope is split into three parts
    (24 bits) and the position into two exact ones (up to 65,536, the limit in config/encodings.py), which makes 6
    channels. The query's own term is subtracted in a seventh channel, so that scores of nearby keys stay small; its
    rounding has no effect, since it is the same for all keys. The channels precede the head's own, in descending
    magnitude: kernels sum in that order, so large terms cancel before small ones are added. A zero follows each
    channel: AMX accumulates even and odd channels separately (TDPBF16PS in Intel's manual), and terms that cancel must
    meet in the same sum. With two more zeros they fill a group of 16, in which tensor cores align products to the
    largest. Queries hold the slopes, so grouped queries still share keys.
    """

    encodes = True

    def __init__(self, slopes_N: Tensor, head_width: int) -> None:
        # Attention multiplies scores by 1/sqrt(H), which must not scale the bias.
        self.slopes_N = slopes_N.to(torch.float32) * math.sqrt(head_width)
        self._slopes = DeviceCopies(self.slopes_N)

    def prepare(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the bias channels of this rank's queries [B, N, T, 16] and of keys [B, 1, T, 16]."""
        back_B1T = (positions_BT[:, -1:] - positions_BT)[:, None]  # distance to the last key, in positions, >= 0
        for_queries = alibi_query_channels(self._slopes.on(positions_BT.device)[:, None], back_B1T.float())
        return spread_channels(for_queries.to(dtype)), spread_channels(alibi_key_channels(back_B1T).to(dtype))

    def encode(self, q_BNTH: Tensor, k_BGTH: Tensor, prepared: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return queries and keys with bias channels in front, and zeros at the end if the width requires them."""
        for_queries, for_keys = prepared
        pad = self.num_extra_channels(q_BNTH.shape[-1]) - BIAS_CHANNELS
        return _prepend(for_queries, q_BNTH, pad), _prepend(for_keys, k_BGTH, pad)

    def reach(self, q_BNTH: Tensor, k_BGTH: Tensor) -> Tensor:
        """Return the distance beyond which a key's weight is at most 2^-24 / T of that of the query's own key.

        A query's own key has no bias. The unbiased score of another key exceeds it by at most |q| times the longest
        key, less the query's own product, all divided by sqrt(H). Beyond the reach, slope x distance exceeds that by at
        least 24 ln 2 + ln T. 1 is added for rounding.
        """
        num_tokens, root = q_BNTH.shape[2], math.sqrt(q_BNTH.shape[-1])
        q_BGRTH, k_BG1TH = q_BNTH.float().unflatten(1, (k_BGTH.shape[1], -1)), k_BGTH.float()[:, :, None]
        longest_BG11 = k_BG1TH.norm(dim=-1).amax(dim=-1, keepdim=True)
        higher_BGRT = q_BGRTH.norm(dim=-1) * longest_BG11 - (q_BGRTH * k_BG1TH).sum(dim=-1)
        higher_N = higher_BGRT.amax(dim=(0, 3)).flatten() / root
        return (higher_N + 24 * math.log(2) + math.log(num_tokens) + 1) * root / self.slopes_N.to(q_BNTH.device)

    @staticmethod
    def num_extra_channels(head_width: int) -> int:
        """Return the width of the channels, plus padding to a multiple of 8."""
        return BIAS_CHANNELS + -head_width % 8

    @staticmethod
    def prepared_width(head_width: int, num_heads: float) -> float:
        """Return the number of channels of all queries, and of keys, which heads share."""
        del head_width
        return (num_heads + 1) * BIAS_CHANNELS


class Alibi(KeyBias):
    """ALiBi over positions in the sequence, or over segment numbers with slopes 96 times as steep."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        factor = BILEVEL_ALIBI_FACTOR if config.bilevel else 1.0
        slopes = alibi_slopes(config.num_heads)[local_heads(config.num_heads, layers)]
        # Slopes are constants, not weights: they are real tensors even if the layers are on the meta device.
        super().__init__(torch.tensor(slopes, device="cpu") * factor, config.head_width)


def _prepend(channels_BNTC: Tensor, x_BNTH: Tensor, pad: int) -> Tensor:
    wide_BNTE = torch.cat((channels_BNTC.expand(*x_BNTH.shape[:-1], -1), x_BNTH), dim=-1)
    return torch.nn.functional.pad(wide_BNTE, (0, pad)) if pad else wide_BNTE


class T5Bias(nn.Module, RelativeEncoding):
    """A learned bias per head and distance bucket, added to the scores.

    Each block has its own embedding (T5 shares one, which pipeline stages cannot). The O(T^2) scores of each head are
    materialized, since a bias rules out fused attention.

    Source: Raffel et al. 2020 (arXiv 1910.10683), the buckets of its decoder.
    """

    biases_scores = True

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.table = layers.per_head_embedding(NUM_T5_BUCKETS, config.num_heads)
        self._same_positions = not config.bilevel
        first_head = layers.rank * config.num_heads // layers.ranks
        here = local_heads(config.num_heads, layers)
        self._own_heads = slice(here.start - first_head, here.stop - first_head)

    def prepare(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the buckets of all pairs, int64 [B or 1, T, T], and the mask of later keys [T, T].

        There is one row of buckets if all sequences have the same positions.
        """
        del dtype
        rows_BT = positions_BT[:1] if self._same_positions else positions_BT
        buckets_BTT = t5_buckets(rows_BT[:, :, None] - rows_BT[:, None, :])
        return buckets_BTT, torch.ones_like(buckets_BTT[0], dtype=torch.bool).triu(1)

    def score_bias(self, prepared: tuple[Tensor, Tensor]) -> Tensor:
        """Return the bias of this rank's heads, -inf at later keys."""
        buckets_BTT, later_TT = prepared
        bias_BnTT = self.table(buckets_BTT)[..., self._own_heads].permute(0, 3, 1, 2)
        return bias_BnTT.masked_fill(later_TT, -torch.inf)
