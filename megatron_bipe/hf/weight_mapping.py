"""Mapping between the weights of the training model and LLaMA's (Hugging Face): names and layouts.

The training model fuses query, key and value rows per key/value group and stacks gate on top of up; LLaMA stores them
separately. Both directions only split and concatenate rows, so a round trip is bit-exact.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megatron_bipe.config import ModelConfig
from megatron_bipe.errors import CheckpointError

T = TypeVar("T")
INTRA_EMBEDDING = "model.embed_intra.weight"  # LLaMA has no such embeddings
_POSITION_EMBEDDING = "model.embed_positions.weight"
_OWN_WEIGHTS = "weights of the training model"  # location in errors

_BLOCK_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_BIAS = {"attention.encoding.table.weight": "self_attn.relative_bias.weight"}  # T5 only
_QKV, _GATE_UP = "attention.qkv.weight", "mlp.gate_up.weight"
_QKV_PARTS = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
_GATE_UP_PARTS = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


class LlamaWeights(Mapping[str, Tensor]):
    """Weights of the training model under LLaMA's names and in LLaMA's order, split on access.

    Only the training weight accessed last is cached, because neighbours often come from the same one.

    Args:
        weights: weights by the training model's names; may load lazily.
        config: configuration of the model.

    Raises:
        CheckpointError: a weight is missing or unexpected.
        RuntimeError: on access, a weight's shape does not fit the layout of `config`.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: ModelConfig) -> None:
        self._weights, self._sources = weights, _sources(config)
        self._last: tuple[str, Tensor] | None = None
        needed, remaining = {source for source, _ in self._sources.values()}, dict.fromkeys(weights)
        for name in sorted(needed):
            _take(remaining, _OWN_WEIGHTS, name)
        _refuse_remaining(remaining, _OWN_WEIGHTS)

    def __getitem__(self, name: str) -> Tensor:
        source, cut = self._sources[name]
        if self._last is None or self._last[0] != source:
            self._last = None  # free it before the next is read
            self._last = (source, self._weights[source])
        return cut(self._last[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def to_llama(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return all weights under LLaMA's names and in LLaMA's order; raises as `LlamaWeights` does."""
    return dict(LlamaWeights(weights, config))


def _sources(config: ModelConfig) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Return for each LLaMA name the training model's name and the function that extracts the weight."""
    last = config.num_layers + 1
    result: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "model.embed_tokens.weight": ("0.token.weight", _unchanged)
    }
    result |= {theirs: (ours, _unchanged) for ours, theirs in _position_names(config).items()}
    for layer in range(config.num_layers):
        ours, theirs = f"{layer + 1}.", f"model.layers.{layer}."
        for part, name in enumerate(_QKV_PARTS):
            result[theirs + name] = (ours + _QKV, partial(_part_of_qkv, config, part))
        for part, name in enumerate(_GATE_UP_PARTS):
            result[theirs + name] = (ours + _GATE_UP, partial(_half, part))
        result |= {theirs + name: (ours + source, _unchanged) for source, name in _block_names(config).items()}
    result["model.norm.weight"] = (f"{last}.norm.weight", _unchanged)
    if not config.tied_output:
        result["lm_head.weight"] = (f"{last}.output.weight", _unchanged)
    return result


def _position_names(config: ModelConfig) -> dict[str, str]:
    if config.embedding_rows is None:
        return {}
    return {"0.intra.weight": INTRA_EMBEDDING} if config.bilevel else {"0.place.weight": _POSITION_EMBEDDING}


def _block_names(config: ModelConfig) -> dict[str, str]:
    return _BLOCK_NAMES | (_BIAS if config.parts.relative == "t5" else {})


def _unchanged(weight: Tensor) -> Tensor:
    return weight


def _half(part: int, gate_up: Tensor) -> Tensor:
    return gate_up.chunk(2)[part]


def _part_of_qkv(config: ModelConfig, part: int, qkv: Tensor) -> Tensor:
    groups = qkv.unflatten(0, _qkv_shape(config))
    return groups.split((groups.shape[1] - 2, 1, 1), dim=1)[part].flatten(0, 2)


def from_llama(
    weights: Mapping[str, Tensor], config: ModelConfig, location: str | Path = "weights"
) -> dict[str, Tensor]:
    """Return the training model's weights from those under LLaMA names; the inverse of `to_llama`.

    Args:
        weights: all weights of a model.
        config: configuration of the model.
        location: the file or folder that they come from, for error messages.

    Raises:
        CheckpointError: a weight is missing or unexpected.
    """
    last = config.num_layers + 1
    remaining = dict(weights)
    take = partial(_take, remaining, location)
    result = {"0.token.weight": take("model.embed_tokens.weight")}
    result |= {ours: take(theirs) for ours, theirs in _position_names(config).items()}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        groups, _, width = _qkv_shape(config)
        parts = [take(prefix + name).unflatten(0, (groups, -1, width)) for name in _QKV_PARTS]
        result[f"{layer + 1}.{_QKV}"] = torch.cat(parts, dim=1).flatten(0, 2)
        result[f"{layer + 1}.{_GATE_UP}"] = torch.cat([take(prefix + name) for name in _GATE_UP_PARTS])
        for ours, theirs in _block_names(config).items():
            result[f"{layer + 1}.{ours}"] = take(prefix + theirs)
    result[f"{last}.norm.weight"] = take("model.norm.weight")
    tied = config.tied_output
    result[f"{last}.output.weight"] = result["0.token.weight"] if tied else take("lm_head.weight")
    _refuse_remaining(remaining, location)
    return result


def _qkv_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Return the number of groups, the heads per group (queries, one key, one value) and the head width."""
    return config.kv_heads, config.num_heads // config.kv_heads + 2, config.head_width


def _take(remaining: dict[str, T], location: str | Path, name: str) -> T:
    if name not in remaining:
        raise CheckpointError(
            f"weight {name!r} is missing",
            remedy="Check that the weights and the configuration belong to the same model",
            location=location,
        )
    return remaining.pop(name)


def _refuse_remaining(remaining: Mapping[str, object], location: str | Path) -> None:
    if remaining:
        raise CheckpointError(
            f"{len(remaining)} weights belong to no layer of the configured model: {_first_names(remaining)}",
            remedy="Check that the weights and the configuration belong to the same model",
            location=location,
        )


def _first_names(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")
