"""What a relative encoding is to attention, and how all blocks of a stage share what it makes of positions.

B batch · T positions · N query heads · G key/value heads · H head width · E widened head
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory


class RelativeEncoding:
    """None at all, as in NoPE: the causal mask alone tells order. Others replace what they need.

    Attention after it is causal attention, whatever the encoding. Positions are segment counts for the bilevel models
    and places in the window for the others; the encodings cannot tell.

    Source: Kazemnejad et al. 2023 (arXiv 2305.19466).
    """

    encodes: ClassVar[bool] = False
    """Whether `encode` makes other queries and keys."""
    biases_scores: ClassVar[bool] = False
    """Whether there is a `score_bias`."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        del config, layers

    def __call__(self, q_BNTH: Tensor, k_BGTH: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Both steps, where no block shares the first."""
        return self.encode(q_BNTH, k_BGTH, self.prepare(positions_BT, q_BNTH.dtype))

    def prepare(self, positions_BT: Tensor, dtype: torch.dtype) -> Any:
        """What follows from positions [B, T] of whole windows alone, for `encode` and `score_bias` of all blocks."""
        del positions_BT, dtype

    def encode(self, q_BNTH: Tensor, k_BGTH: Tensor, prepared: Any) -> tuple[Tensor, Tensor]:
        """Encoded queries and keys; their last width may have grown (equally, to a multiple of 8)."""
        del prepared
        return q_BNTH, k_BGTH

    def score_bias(self, prepared: Any) -> Tensor | None:
        """What is added to scores [B or 1, N, T, T], minus infinity at later keys; None lets attention stay fused."""
        del prepared
        return None

    def reach(self, q_BNTH: Tensor, k_BGTH: Tensor) -> Tensor | None:
        """How far back a key has any weight, fp32 [N], in positions, for queries and keys as `encode` takes them.

        All keys further back together have less of a query's weight than 2^-24. None: there is no such bound.
        """
        del q_BNTH, k_BGTH
        return None

    @staticmethod
    def widening(head_width: int) -> int:
        """Channels by which `encode` widens heads."""
        del head_width
        return 0

    @staticmethod
    def table_width(head_width: int) -> int:
        """Numbers that `prepare` keeps for each position, in compute precision."""
        del head_width
        return 0


class SharedTables:
    """Remembers what was prepared of positions for as long as the positions exist.

    All blocks of a stage get the same positions tensor, also when backward runs them again.
    """

    def __init__(self) -> None:
        self._of = WeakTensorKeyDictionary()

    def prepared(self, encoding: RelativeEncoding, positions_BT: Tensor, dtype: torch.dtype) -> Any:
        """`encoding.prepare`, once; `encoding` is that of any block."""
        by_dtype = self._of.setdefault(positions_BT, {})
        if dtype not in by_dtype:
            by_dtype[dtype] = encoding.prepare(positions_BT, dtype)
        return by_dtype[dtype]
