"""Causal attention for any relative encoding, computed by PyTorch's fused kernels.

The score matrix is materialized only for an encoding that adds its own bias to it (T5).

B batch · T positions · D width · N query heads · G key/value heads · R queries per group · H head width
E widened head · C chunks of queries (lower case: this rank's shard)
"""

import math
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bipe.config import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory
from megatron_bipe.model.positions.base import Prepared, make_relative
from megatron_bipe.model.positions.functional import log_scale_factors

MIN_WINDOWED_TOKENS = 2048  # shortest sequence for which `windowed_attention` is faster
CHUNK = 256  # queries that attend to the same range of keys
_STEP = 64  # key ranges start at multiples of this, so that heads of similar reach share a call


class Attention(nn.Module):
    """Grouped-query attention over one fused projection.

    The rows of `qkv` are ordered by group: R query heads, then the group's key head, then its value head. A contiguous
    slice of the rows that tensor parallelism assigns to a rank therefore holds complete groups.

    If more ranks share the heads than there are groups, each group is split: every part has some of its queries, and a
    replica of its key and value. If tensor-parallel ranks then hold incomplete groups, they gather the projection.
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        width, head_width = config.hidden_size, config.head_width
        ranks = layers.ranks * layers.exchange.ranks
        self.head_width = head_width
        self.parts = max(1, ranks // config.kv_heads)  # of each group
        self.queries_per_group = config.num_heads // config.kv_heads // self.parts
        self.gather_columns = layers.gather_columns if config.kv_heads % layers.ranks else None
        groups = config.kv_heads * self.parts // layers.ranks
        first = layers.rank * groups if self.gather_columns else 0
        self.own_groups = range(first, first + groups)  # in the tensor that `_groups` receives, in parts
        self.log_scale_tokens = config.train_len_tokens if config.log_scale else None
        self.exchange = layers.exchange
        self.encoding = make_relative(config, layers)
        self.qkv = layers.column(width, (config.num_heads + 2 * config.kv_heads) * head_width)
        self.out = layers.row(config.num_heads * head_width, width)

    def prepare(self, positions_BT: Tensor, dtype: torch.dtype) -> Prepared:
        """Compute from positions of full sequences what `forward` of all blocks needs."""
        query_scale = None
        if self.log_scale_tokens is not None:
            query_scale = log_scale_factors(positions_BT, self.log_scale_tokens).to(dtype)
        return Prepared(self.encoding.prepare(positions_BT, dtype), query_scale)

    def forward(self, hidden_BtD: Tensor, positions_BT: Tensor, prepared: Prepared) -> Tensor:
        """Return the attention output [B, t, D]; `prepared` is the result of `prepare` for `positions_BT`."""
        qkv_BTgRH = self.exchange.to_heads(self._groups(self.qkv(hidden_BtD)))
        # `split` has one gradient; indexed views would each have one of full size, to be added up.
        by_kind = qkv_BTgRH.split([self.queries_per_group, 1, 1], dim=-2)
        q_BnTH, k_BgTH, v_BgTH = (x_BTgRH.flatten(2, 3).transpose(1, 2) for x_BTgRH in by_kind)
        if prepared.query_scale is not None:
            q_BnTH = q_BnTH * prepared.query_scale
        reach_n = self.encoding.reach(q_BnTH, k_BgTH) if prefers_windowed_attention(q_BnTH) else None
        q_BnTE, k_BgTE = self.encoding.encode(q_BnTH, k_BgTH, prepared.encoding)
        if reach_n is None:
            mixed_BnTH = causal_attention(q_BnTE, k_BgTE, v_BgTH, self.encoding.score_bias(prepared.encoding))
        else:
            mixed_BnTH = windowed_attention(q_BnTE, k_BgTE, v_BgTH, positions_BT, reach_n)
        return self.out(self.exchange.to_tokens(mixed_BnTH.transpose(1, 2)).flatten(2))

    def _groups(self, qkv_Btf: Tensor) -> Tensor:
        """Return this rank's groups [B, t, G, R + 2, H] of a projection."""
        per_group = self.queries_per_group
        if self.gather_columns:
            qkv_Btf = self.gather_columns(qkv_Btf)
        qkv_BtGRH = qkv_Btf.unflatten(-1, (-1, self.parts * per_group + 2, self.head_width))
        if self.parts == 1:
            return qkv_BtGRH
        by_group = [group.split([per_group] * self.parts + [2], dim=2) for group in qkv_BtGRH.unbind(2)]
        own_parts = (divmod(number, self.parts) for number in self.own_groups)
        groups = [torch.cat([by_group[group][part], by_group[group][-1]], dim=2) for group, part in own_parts]
        return torch.stack(groups, dim=2)


def causal_attention(q_BNTE: Tensor, k_BGTE: Tensor, v_BGTH: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute causal attention; queries and keys may be wider than values (E >= H) by bias channels.

    Scores are scaled by 1/sqrt(H). Values are zero-padded to width E, since the fused kernels require equal widths, and
    the result [B, N, T, H] is cut back.

    Args:
        q_BNTE: queries.
        k_BGTE: keys; N is a multiple of G.
        v_BGTH: values.
        mask: replaces the causal mask: a bias that is added to the scores, or True where a query attends to a key.
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


def prefers_windowed_attention(q_BNTH: Tensor) -> bool:
    """Return True for long sequences on a CPU without gradients.

    Shorter sequences gain nothing, since they have few chunks; GPUs have not been measured.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return q_BNTH.shape[2] >= MIN_WINDOWED_TOKENS and q_BNTH.device.type == "cpu"


def windowed_attention(q_BNTE: Tensor, k_BGTE: Tensor, v_BGTH: Tensor, positions_BT: Tensor, reach_N: Tensor) -> Tensor:
    """Compute `causal_attention` without the keys that are beyond the reach of a head.

    Queries are processed in chunks; within a chunk, heads with the same first key share one call. Positions are
    ascending; `reach_N` is how far back from its own position a query of each head attends, in positions.
    """
    num_tokens, per_group = q_BNTE.shape[2], q_BNTE.shape[1] // k_BGTE.shape[1]
    mixed_BNTH = v_BGTH.new_empty(*q_BNTE.shape[:3], v_BGTH.shape[-1])
    for number, first_keys in enumerate(_first_keys(positions_BT, reach_N)):
        queries = slice(number * CHUNK, min((number + 1) * CHUNK, num_tokens))
        heads_by_first_key: dict[int, list[int]] = defaultdict(list)
        for head, first_key in enumerate(first_keys):
            heads_by_first_key[first_key].append(head)
        for first_key, heads in heads_by_first_key.items():
            keys, kv_heads = slice(first_key, queries.stop), [head // per_group for head in heads]
            earlier = queries.start - first_key
            num_queries = queries.stop - queries.start
            mask = torch.ones(num_queries, earlier + num_queries, dtype=torch.bool, device=q_BNTE.device).tril(earlier)
            mixed_BNTH[:, heads, queries] = causal_attention(
                q_BNTE[:, heads, queries], k_BGTE[:, kv_heads, keys], v_BGTH[:, kv_heads, keys], mask
            )
    return mixed_BNTH


def _first_keys(positions_BT: Tensor, reach_N: Tensor) -> list[list[int]]:
    """Return for each chunk the first key that each head reaches in any sequence, rounded down to `_STEP`: [C][N]."""
    farthest_BCN = positions_BT[:, ::CHUNK, None] - reach_N
    first_BCN = torch.searchsorted(positions_BT.to(reach_N.dtype), farthest_BCN.flatten(1)).view_as(farthest_BCN)
    starts_C1 = torch.arange(first_BCN.shape[1], device=reach_N.device)[:, None] * CHUNK
    # NaN scores give no bound; such a chunk then attends at least to itself, so that the NaN propagates.
    result: list[list[int]] = (first_BCN.amin(dim=0).minimum(starts_C1) // _STEP * _STEP).tolist()
    return result
