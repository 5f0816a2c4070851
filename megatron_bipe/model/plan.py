"""The model as an ordered list of layers: the one definition that every engine runs.

Layer 0 embeds, layers 1 to L are blocks, layer L + 1 is the head. A layer takes and returns one payload, so
the list runs as an `nn.Sequential` or cut into pipeline stages, and parameter names are
`<layer index>.<name>` in both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.activation_checkpointing import Recompute
from megatron_bipe.model.block import Block
from megatron_bipe.model.embedding import Embedding
from megatron_bipe.model.head import Head
from megatron_bipe.model.init import init_layer
from megatron_bipe.model.layer_factory import LayerFactory, LocalLayers
from megatron_bipe.model.positions.base import SharedTables
from megatron_bipe.model.tied import copied, tie, tie_to_copy


@dataclass(frozen=True)
class LayerPlan:
    """One layer: what it is, and how to make it with its initial weights."""

    index: int
    kind: str
    build: Callable[[], nn.Module]


def make_plan(
    config: ModelConfig, seed: int, layers: LayerFactory | None = None, recompute: Recompute = "none"
) -> list[LayerPlan]:
    """The layers of the model in order; nothing is allocated until a layer is built."""
    factory = layers or LocalLayers()
    block = partial(Block, config, factory, recompute, SharedTables())
    kinds: list[tuple[str, Callable[[], nn.Module]]] = [
        ("Embedding", partial(Embedding, config, factory, seed)),
        *[("Block", block)] * config.num_layers,
        ("Head", partial(Head, config, factory)),
    ]

    def build(index: int) -> nn.Module:
        layer = kinds[index][1]()
        init_layer(layer, index, config, seed)
        if config.tied_output and isinstance(layer, Head):
            tie_to_copy(layer, embedding=build(0))
        return layer

    return [LayerPlan(index, kind, partial(build, index)) for index, (kind, _) in enumerate(kinds)]


def build_model(
    config: ModelConfig, seed: int = 0, layers: LayerFactory | None = None, recompute: Recompute = "none"
) -> nn.Sequential:
    """The whole model in one process: (tokens, intra, inter) int64 [B, T] each -> logits [B, T, V]."""
    model = nn.Sequential(*(layer.build() for layer in make_plan(config, seed, layers, recompute)))
    if config.tied_output:
        tie(model[-1], embedding=model[0])
    return model


def count_parameters(config: ModelConfig, layers: LayerFactory | None = None) -> list[int]:
    """Parameters of each layer of the plan, in order, on a rank whose layers come from `layers`.

    A tied output counts with layer 0. No memory is allocated for them.
    """
    with torch.device("meta"):
        built = [layer.build() for layer in make_plan(config, seed=0, layers=layers)]
    return [sum(p.numel() for p in layer.parameters() if not copied(p)) for layer in built]


def train_flops_per_token(config: ModelConfig, seq_len_tokens: int) -> int:
    """Floating-point operations of forward and backward for one token of a window; recomputation not counted.

    Two per weight of every matrix and token forward, twice that backward; attention scores and mixing count
    the causal half only. Table look-ups, norms and softmax are left out.
    """
    heads_width = config.num_heads * config.head_width
    attention_weights = config.hidden_size * (2 * config.num_heads + 2 * config.kv_heads) * config.head_width
    block_weights = attention_weights + 3 * config.hidden_size * config.ffn_size
    weights = config.num_layers * block_weights + config.hidden_size * config.vocab_size
    scores_and_mixing = config.num_layers * 2 * heads_width * seq_len_tokens // 2
    return 3 * 2 * (weights + scores_and_mixing)
