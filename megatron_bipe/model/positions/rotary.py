"""RoPE, plain or extended by one of the types of `model.rope_scaling`, and xPos, whose scores decay with distance.

B batch · T positions · N heads · H head width
"""

import torch
from torch import Tensor

from megatron_bipe.config import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory
from megatron_bipe.model.positions import functional
from megatron_bipe.model.positions.base import DeviceCopies, RelativeEncoding
from megatron_bipe.model.positions.functional import xpos_factors

Tables = tuple[Tensor, Tensor]  # cosines and sines [B, 1, T, H/2]


class Rotary(RelativeEncoding):
    """Rotation of pairs (i, i + H/2) of queries and keys by position x frequency i: the half-rotation layout.

    Source: Su et al. 2021 (arXiv 2104.09864).
    """

    encodes = True

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        del layers
        self.config = config
        self._frequencies: dict[int, tuple[DeviceCopies, float]] = {}  # by sequence length, if they depend on it

    def prepare(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tables, Tables]:
        """Return cosines and sines for queries and for keys, which are the same here."""
        cos_B1TH, sin_B1TH = self.angles(positions_BT)
        tables = cos_B1TH.to(dtype), sin_B1TH.to(dtype)
        return tables, tables

    def angles(self, positions_BT: Tensor) -> Tables:
        """Return cosines and sines in fp32, times the attention factor of the scaling."""
        frequencies_H, factor = self._frequencies_of(positions_BT.shape[-1])
        return functional.rotary_tables(positions_BT, frequencies_H.on(positions_BT.device), factor)

    def _frequencies_of(self, seq_len_tokens: int) -> tuple[DeviceCopies, float]:
        scaling = self.config.rope_scaling
        length = seq_len_tokens if scaling is not None and scaling.type == "dynamic" else 0
        if length not in self._frequencies:
            frequencies_H, factor = rotary_frequencies(self.config, seq_len_tokens)
            self._frequencies[length] = DeviceCopies(frequencies_H), factor
        return self._frequencies[length]

    def encode(self, q_BNTH: Tensor, k_BNTH: Tensor, prepared: tuple[Tables, Tables]) -> tuple[Tensor, Tensor]:
        for_queries, for_keys = prepared
        return functional.rotate(q_BNTH, *for_queries), functional.rotate(k_BNTH, *for_keys)

    @staticmethod
    def prepared_width(head_width: int, num_heads: float) -> float:
        del num_heads
        return head_width


def rotary_frequencies(config: ModelConfig, seq_len_tokens: int) -> tuple[Tensor, float]:
    """Return radians per position for each pair of channels, fp32 [H/2], and the attention factor.

    Source: linear, Chen et al. 2023 (arXiv 2306.15595); ntk, dynamic, yarn, Peng et al. 2023 (arXiv 2309.00071). A test
    compares all of them with transformers' functions.

    Args:
        config: model configuration.
        seq_len_tokens: length of the current sequences, on which `dynamic` depends.
    """
    scaling, base, width = config.rope_scaling, config.rope_base, config.head_width
    plain_H = functional.rotary_frequencies(width, base)
    if scaling is None:
        return plain_H, 1.0
    factor = scaling.factor
    match scaling.type:
        case "linear":
            return plain_H / factor, 1.0
        case "ntk":
            return functional.rotary_frequencies(width, functional.stretched_base(base, width, factor)), 1.0
        case "dynamic":
            excess = max(1.0, seq_len_tokens / (scaling.original_positions or config.train_len_tokens))
            stretched = functional.stretched_base(base, width, factor * excess - (factor - 1))
            return functional.rotary_frequencies(width, stretched), 1.0
        case "yarn":
            original = scaling.original_positions or config.train_len_tokens
            betas = scaling.beta_fast, scaling.beta_slow
            attention_factor = scaling.attention_factor or functional.yarn_attention_factor(factor)
            return functional.yarn_frequencies(plain_H, base, factor, original, betas), attention_factor


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
    def prepared_width(head_width: int, num_heads: float) -> float:
        """Return a cosine and a sine per pair, for queries and for keys."""
        del num_heads
        return 2 * head_width
