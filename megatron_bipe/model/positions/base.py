"""The interface of relative encodings, and the construction of the configured encoding.

B batch · T positions · N query heads · G key/value heads · H head width · E widened head
"""

import importlib
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_bipe.config import ABSOLUTE, ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory


class RelativeEncoding:
    """Base class, which encodes nothing (NoPE): only the causal mask conveys order. Encodings override what they need.

    Attention is causal for every encoding. Positions are segment numbers in bilevel models and token positions in the
    others; encodings do not distinguish them.

    Source: Kazemnejad et al. 2023 (arXiv 2305.19466).
    """

    encodes: ClassVar[bool] = False
    """True if `encode` changes queries and keys."""
    biases_scores: ClassVar[bool] = False
    """True if `score_bias` returns a bias."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        del config, layers

    def __call__(self, q_BNTH: Tensor, k_BGTH: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Run `prepare` and `encode`, without sharing the former between blocks."""
        return self.encode(q_BNTH, k_BGTH, self.prepare(positions_BT, q_BNTH.dtype))

    def prepare(self, positions_BT: Tensor, dtype: torch.dtype) -> Any:
        """Compute from full-sequence positions what `encode` and `score_bias` of all blocks need."""
        del positions_BT, dtype

    def encode(self, q_BNTH: Tensor, k_BGTH: Tensor, prepared: Any) -> tuple[Tensor, Tensor]:
        """Return encoded queries and keys; both may be wider than before, by the same amount, to a multiple of 8."""
        del prepared
        return q_BNTH, k_BGTH

    def score_bias(self, prepared: Any) -> Tensor | None:
        """Return the bias of scores [B or 1, N, T, T], -inf at later keys; None keeps attention fused."""
        del prepared
        return None

    def reach(self, q_BNTH: Tensor, k_BGTH: Tensor) -> Tensor | None:
        """Return the distance in positions up to which a key has weight, fp32 [N], for unencoded queries and keys.

        All keys beyond it together have less than 2^-24 of a query's weight. None: there is no such bound.
        """
        del q_BNTH, k_BGTH
        return None

    @staticmethod
    def num_extra_channels(head_width: int) -> int:
        """Return the number of channels by which `encode` widens heads."""
        del head_width
        return 0

    @staticmethod
    def prepared_width(head_width: int, num_heads: float) -> float:
        """Return how many numbers in compute precision `prepare` stores per position for a rank's `num_heads`."""
        del head_width, num_heads
        return 0


class DeviceCopies:
    """A constant tensor, and a copy of it on each device that needs one.

    A copy from host memory waits for all work that a GPU has queued, so that it must not recur.
    """

    def __init__(self, constant: Tensor) -> None:
        self._constant = constant
        self._by_device: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._by_device:
            self._by_device[device] = self._constant.to(device)
        return self._by_device[device]


class Prepared(NamedTuple):
    """What attention needs of the positions alone; all blocks use the same tensors."""

    encoding: Any
    """Result of `RelativeEncoding.prepare`."""
    query_scale: Tensor | None
    """Factor of queries [B, 1, T, 1], for `model.log_scale`."""


class PreparedPositions:
    """A cache of `Prepared` that lives as long as the positions tensor.

    All blocks of a stage receive the same positions tensor.
    """

    def __init__(self) -> None:
        self._of = WeakTensorKeyDictionary()

    def prepared(
        self, prepare: Callable[[Tensor, torch.dtype], Prepared], positions_BT: Tensor, dtype: torch.dtype
    ) -> Prepared:
        """Return `prepare(positions_BT, dtype)`, computed once; `prepare` may be that of any block."""
        by_dtype: dict[torch.dtype, Prepared] = self._of.setdefault(positions_BT, {})
        if dtype not in by_dtype:
            by_dtype[dtype] = prepare(positions_BT, dtype)
        return by_dtype[dtype]


def relative_class(config: ModelConfig) -> type[RelativeEncoding]:
    found: type[RelativeEncoding] = _named(config.relative.class_path)
    return found


def make_relative(config: ModelConfig, layers: LayerFactory) -> RelativeEncoding:
    """Make the relative part of one block, for the query heads of the rank of `layers`."""
    return relative_class(config)(config, layers)


def make_absolute(config: ModelConfig, layers: LayerFactory) -> nn.Module | None:
    """Make the absolute part: positions int64 [B, t] -> a term of the residual stream; None if there is none."""
    class_path = ABSOLUTE[config.parts.absolute]
    return None if class_path is None else _named(class_path)(config, layers)


def _named(class_path: str) -> Any:
    module, _, name = class_path.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)
