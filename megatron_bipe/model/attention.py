"""Causal attention for any relative encoding, by stock kernels.

Scores are materialised only by an encoding that adds a bias of its own to them (T5).

B batch · T positions · D width · N query heads · G key/value heads · R queries a group · H head width · E widened head
C chunks of queries (lower case: this rank's shard)
"""

import math
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory
from megatron_bipe.model.positions.base import SharedTables
from megatron_bipe.model.positions.functional import log_scale_factors
from megatron_bipe.model.positions.make import make_relative

MIN_WINDOWED_TOKENS = 2048  # tokens from which on leaving out pays
CHUNK = 256  # queries that see the same keys
_STEP = 64  # keys begin at multiples of this, so that heads of about the same reach go together


class Attention(nn.Module):
    """Grouped-query attention over one fused projection.

    The rows of `qkv` go group by group: R query heads, then the group's key head, then its value head, so
    that a contiguous share of the rows is a whole number of groups.
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory, tables: SharedTables | None = None) -> None:
        super().__init__()
        width, head_width = config.hidden_size, config.head_width
        self.head_width = head_width
        self.queries_per_group = config.num_heads // config.kv_heads
        self.log_scale_tokens = config.train_len_tokens if config.log_scale else None
        self.exchange = layers.exchange
        self.encoding = make_relative(config, layers)
        self._tables = tables or SharedTables()
        self.qkv = layers.column(width, (config.num_heads + 2 * config.kv_heads) * head_width)
        self.out = layers.row(config.num_heads * head_width, width)

    def forward(self, hidden_BtD: Tensor, positions_BT: Tensor) -> Tensor:
        """Attention output [B, t, D]; `positions_BT`, of whole windows, is what the encoding sees."""
        per_group = self.queries_per_group
        qkv_BtGRH = self.qkv(hidden_BtD).unflatten(-1, (-1, per_group + 2, self.head_width))
        qkv_BTgRH = self.exchange.to_heads(qkv_BtGRH)
        q_BnTH = qkv_BTgRH[..., :per_group, :].flatten(2, 3).transpose(1, 2)
        k_BgTH = qkv_BTgRH[..., per_group, :].transpose(1, 2)
        v_BgTH = qkv_BTgRH[..., per_group + 1, :].transpose(1, 2)
        if self.log_scale_tokens is not None:
            q_BnTH = q_BnTH * log_scale_factors(positions_BT, self.log_scale_tokens).to(q_BnTH.dtype)
        prepared = self._tables.prepared(self.encoding, positions_BT, q_BnTH.dtype)
        reach_n = self.encoding.reach(q_BnTH, k_BgTH) if leaving_out_pays(q_BnTH) else None
        q_BnTE, k_BgTE = self.encoding.encode(q_BnTH, k_BgTH, prepared)
        if reach_n is None:
            mixed_BnTH = causal_attention(q_BnTE, k_BgTE, v_BgTH, self.encoding.score_bias(prepared))
        else:
            mixed_BnTH = windowed_attention(q_BnTE, k_BgTE, v_BgTH, positions_BT, reach_n)
        return self.out(self.exchange.to_tokens(mixed_BnTH.transpose(1, 2)).flatten(2))


def causal_attention(q_BNTE: Tensor, k_BGTE: Tensor, v_BGTH: Tensor, mask: Tensor | None = None) -> Tensor:
    """Stock attention; queries and keys may be wider than values (E >= H) by bias channels.

    Scores are scaled by 1/sqrt(H). Values are padded with zeros to the same width, because the fused kernels
    want one width, and the padding is cut off again. Returns [B, N, T, H].

    Args:
        q_BNTE: queries.
        k_BGTE: keys; N is a multiple of G.
        v_BGTH: values.
        mask: in place of the causal one, what is added to scores, or whether a query sees a key.
    """
    head_width, extra = v_BGTH.shape[-1], q_BNTE.shape[-1] - v_BGTH.shape[-1]
    mixed_BNTE = F.scaled_dot_product_attention(
        q_BNTE,
        k_BGTE,
        F.pad(v_BGTH, (0, extra)) if extra else v_BGTH,
        attn_mask=mask,
        is_causal=mask is None,
        scale=1.0 / math.sqrt(head_width),
        enable_gqa=q_BNTE.shape[1] != k_BGTE.shape[1],
    )
    return mixed_BNTE[..., :head_width]


def leaving_out_pays(q_BNTH: Tensor) -> bool:
    """Whether `windowed_attention` is to be preferred: for long windows on a CPU, where no gradients are wanted.

    Shorter windows are a few calls of whole chunks anyway; on a GPU it has not been measured.
    """
    return q_BNTH.shape[2] >= MIN_WINDOWED_TOKENS and q_BNTH.device.type == "cpu" and not torch.is_grad_enabled()


def windowed_attention(q_BNTE: Tensor, k_BGTE: Tensor, v_BGTH: Tensor, positions_BT: Tensor, reach_N: Tensor) -> Tensor:
    """`causal_attention` without the keys that a head does not reach.

    The window is cut into chunks of queries. In each, heads that begin with about the same key are one call.

    Args:
        q_BNTE: queries.
        k_BGTE: keys; N is a multiple of G.
        v_BGTH: values.
        positions_BT: in ascending order.
        reach_N: how far back from its own position a query of each head looks, in positions.
    """
    num_tokens, per_group = q_BNTE.shape[2], q_BNTE.shape[1] // k_BGTE.shape[1]
    mixed_BNTH = v_BGTH.new_empty(*q_BNTE.shape[:3], v_BGTH.shape[-1])
    for number, first_keys in enumerate(_first_keys(positions_BT, reach_N)):
        queries = slice(number * CHUNK, min((number + 1) * CHUNK, num_tokens))
        alike: dict[int, list[int]] = defaultdict(list)
        for head, first_key in enumerate(first_keys):
            alike[first_key].append(head)
        for first_key, heads in alike.items():
            keys, shared = slice(first_key, queries.stop), [head // per_group for head in heads]
            earlier = queries.start - first_key
            num_queries = queries.stop - queries.start
            mask = torch.ones(num_queries, earlier + num_queries, dtype=torch.bool, device=q_BNTE.device).tril(earlier)
            mixed_BNTH[:, heads, queries] = causal_attention(
                q_BNTE[:, heads, queries], k_BGTE[:, shared, keys], v_BGTH[:, shared, keys], mask
            )
    return mixed_BNTH


def _first_keys(positions_BT: Tensor, reach_N: Tensor) -> list[list[int]]:
    """Of each chunk, the first key that each head reaches in any window of the batch, rounded down: [C][N]."""
    farthest_BCN = positions_BT[:, ::CHUNK, None] - reach_N
    first_BCN = torch.searchsorted(positions_BT.to(reach_N.dtype), farthest_BCN.flatten(1)).view_as(farthest_BCN)
    starts_C1 = torch.arange(first_BCN.shape[1], device=reach_N.device)[:, None] * CHUNK
    # Scores that are no numbers give no bound; their chunks see themselves, so that results are none either.
    result: list[list[int]] = (first_BCN.amin(dim=0).minimum(starts_C1) // _STEP * _STEP).tolist()
    return result
