"""Causal attention for any relative encoding; only one that adds a bias of its own to scores materialises them.

B batch · T positions · D width · N query heads · G key/value heads · R queries a group · H head width
(lower case: this rank's share)
"""

import math

from torch import Tensor, nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.causal import causal_attention, leaving_out_pays, windowed_attention
from megatron_bipe.model.layer_factory import LayerFactory
from megatron_bipe.model.positions.base import SharedTables
from megatron_bipe.model.positions.make import make_relative


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
        self.log_scale_base = math.log(config.train_len_tokens) if config.log_scale else None
        self.windows = layers.windows
        self.encoding = make_relative(config, layers)
        self._tables = tables or SharedTables()
        self.qkv = layers.column(width, (config.num_heads + 2 * config.kv_heads) * head_width)
        self.out = layers.row(config.num_heads * head_width, width)

    def forward(self, hidden_BtD: Tensor, positions_BT: Tensor) -> Tensor:
        """Attention output [B, t, D]; `positions_BT`, of whole windows, is what the encoding sees."""
        per_group = self.queries_per_group
        qkv_BtGRH = self.qkv(hidden_BtD).unflatten(-1, (-1, per_group + 2, self.head_width))
        qkv_BTgRH = self.windows.to_heads(qkv_BtGRH)
        q_BnTH = qkv_BTgRH[..., :per_group, :].flatten(2, 3).transpose(1, 2)
        k_BgTH = qkv_BTgRH[..., per_group, :].transpose(1, 2)
        v_BgTH = qkv_BTgRH[..., per_group + 1, :].transpose(1, 2)
        if self.log_scale_base is not None:
            growth_BT = (positions_BT + 1).float().log() / self.log_scale_base
            q_BnTH = q_BnTH * growth_BT.to(q_BnTH.dtype)[:, None, :, None]
        prepared = self._tables.prepared(self.encoding, positions_BT, q_BnTH.dtype)
        reach_n = self.encoding.reach(q_BnTH, k_BgTH) if leaving_out_pays(q_BnTH) else None
        q_BnTE, k_BgTE = self.encoding.encode(q_BnTH, k_BgTH, prepared)
        if reach_n is None:
            mixed_BnTH = causal_attention(q_BnTE, k_BgTE, v_BgTH, self.encoding.score_bias(prepared))
        else:
            mixed_BnTH = windowed_attention(q_BnTE, k_BgTE, v_BgTH, positions_BT, reach_n)
        return self.out(self.windows.to_tokens(mixed_BnTH.transpose(1, 2)).flatten(2))
