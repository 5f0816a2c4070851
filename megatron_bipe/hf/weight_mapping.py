"""Names and layouts of weights: the training plan's on one side, LLaMA's (Hugging Face) on the other.

The plan fuses query, key and value rows group by group and stacks gate over up; LLaMA keeps them apart.
Both directions only cut and join rows, so a round trip is exact bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.errors import CheckpointError

T = TypeVar("T")
INTRA_TABLE = "model.embed_intra.weight"  # LLaMA has no names for these
_PLACE_TABLE = "model.embed_positions.weight"

_BLOCK_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_BIAS = {"attention.encoding.table.weight": "self_attn.relative_bias.weight"}  # of T5, in each block
_QKV, _GATE_UP = "attention.qkv.weight", "mlp.gate_up.weight"
_QKV_PARTS = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
_GATE_UP_PARTS = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


class LlamaWeights(Mapping[str, Tensor]):
    """Plan weights under LLaMA names, in LLaMA's order; each is cut out when it is asked for.

    Only the last plan weight looked at is kept, since neighbours are often cut from the same one.

    Args:
        weights: under the plan's names; may read them when asked.
        config: of the model.

    Raises:
        CheckpointError: a weight is missing or unexpected.
        RuntimeError: on access, where a weight has a shape that the layout of `config` cannot be cut from.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: ModelConfig) -> None:
        self._weights, self._sources = weights, _sources(config)
        self._last: tuple[str, Tensor] | None = None
        needed, rest = {source for source, _ in self._sources.values()}, dict.fromkeys(weights)
        for name in sorted(needed):
            _take(rest, name)
        _refuse_rest(rest)

    def __getitem__(self, name: str) -> Tensor:
        source, cut = self._sources[name]
        if self._last is None or self._last[0] != source:
            self._last = None  # before the next is read
            self._last = (source, self._weights[source])
        return cut(self._last[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def to_llama(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Plan weights -> LLaMA names, in LLaMA's order, all at once. Raises what `LlamaWeights` does."""
    return dict(LlamaWeights(weights, config))


def _sources(config: ModelConfig) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """For each LLaMA name the plan's, and how to cut the one out of the other."""
    last = config.num_layers + 1
    result: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "model.embed_tokens.weight": ("0.token.weight", _whole)
    }
    result |= {theirs: (ours, _whole) for ours, theirs in _place_names(config).items()}
    for layer in range(config.num_layers):
        ours, theirs = f"{layer + 1}.", f"model.layers.{layer}."
        for part, name in enumerate(_QKV_PARTS):
            result[theirs + name] = (ours + _QKV, partial(_part_of_qkv, config, part))
        for part, name in enumerate(_GATE_UP_PARTS):
            result[theirs + name] = (ours + _GATE_UP, partial(_half, part))
        result |= {theirs + name: (ours + source, _whole) for source, name in _block_names(config).items()}
    result["model.norm.weight"] = (f"{last}.norm.weight", _whole)
    if not config.tied_output:
        result["lm_head.weight"] = (f"{last}.output.weight", _whole)
    return result


def _place_names(config: ModelConfig) -> dict[str, str]:
    if config.table_rows is None:
        return {}
    return {"0.intra.weight": INTRA_TABLE} if config.bilevel else {"0.place.weight": _PLACE_TABLE}


def _block_names(config: ModelConfig) -> dict[str, str]:
    return _BLOCK_NAMES | (_BIAS if config.parts.relative == "t5" else {})


def _whole(weight: Tensor) -> Tensor:
    return weight


def _half(part: int, gate_up: Tensor) -> Tensor:
    return gate_up.chunk(2)[part]


def _part_of_qkv(config: ModelConfig, part: int, qkv: Tensor) -> Tensor:
    groups = qkv.unflatten(0, _qkv_shape(config))
    return groups.split((groups.shape[1] - 2, 1, 1), dim=1)[part].flatten(0, 2)


def from_llama(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """LLaMA names -> plan weights; the inverse of `to_llama`.

    Raises:
        CheckpointError: a weight is missing or unexpected.
    """
    last = config.num_layers + 1
    rest = dict(weights)
    result = {"0.token.weight": _take(rest, "model.embed_tokens.weight")}
    result |= {ours: _take(rest, theirs) for ours, theirs in _place_names(config).items()}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        groups, _, width = _qkv_shape(config)
        parts = [_take(rest, prefix + name).unflatten(0, (groups, -1, width)) for name in _QKV_PARTS]
        result[f"{layer + 1}.{_QKV}"] = torch.cat(parts, dim=1).flatten(0, 2)
        result[f"{layer + 1}.{_GATE_UP}"] = torch.cat([_take(rest, prefix + name) for name in _GATE_UP_PARTS])
        for ours, theirs in _block_names(config).items():
            result[f"{layer + 1}.{ours}"] = _take(rest, prefix + theirs)
    result[f"{last}.norm.weight"] = _take(rest, "model.norm.weight")
    tied = config.tied_output
    result[f"{last}.output.weight"] = result["0.token.weight"] if tied else _take(rest, "lm_head.weight")
    _refuse_rest(rest)
    return result


def _qkv_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Groups, heads in a group (queries, one key, one value), head width."""
    return config.kv_heads, config.num_heads // config.kv_heads + 2, config.head_width


def _take(rest: dict[str, T], name: str) -> T:
    if name not in rest:
        raise CheckpointError(
            f"weight {name!r} is missing",
            remedy="Check that the weights and the configuration belong to the same model",
            location=_some(rest),
        )
    return rest.pop(name)


def _refuse_rest(rest: Mapping[str, object]) -> None:
    if rest:
        raise CheckpointError(
            f"{len(rest)} weights belong to no layer of the configured model",
            remedy="Check that the weights and the configuration belong to the same model",
            location=_some(rest),
        )


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")
