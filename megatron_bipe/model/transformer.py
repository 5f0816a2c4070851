"""The model as an ordered list of layers, which every engine runs.

    tokens, intra ids, inter ids   int64 [B, T]
        |
    0       Embedding   token embedding + absolute part of the encoding       "0.token.weight", "0.intra.weight"
        |               -> hidden [B, T, D], positions [B, T] that attention encodes
    1..L    Block       hidden + attention(norm(hidden), positions)           "1.attention.qkv.weight", ...
        |               hidden + feed-forward(norm(hidden))                   "1.mlp.gate_up.weight", ...
    L+1     Head        norm, projection to the vocabulary                    "L+1.output.weight"
        |
    logits   [B, T, V]

A layer takes and returns one payload, so that the list runs as an `nn.Sequential` or as pipeline stages; parameters
are named `<layer index>.<name>` in both. Layers with parameters come from a `LayerFactory`, so that the model does not
depend on how they are sharded; `LocalLayers` is the factory of unsharded ones. This file also defines how weights are
initialized and how a tied output shares the token embedding.

B batch · T positions · D width · F feed-forward width · V vocabulary (lower case: this rank's shard)
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megatron_bipe.config import ModelConfig
from megatron_bipe.errors import ConfigError
from megatron_bipe.model.activation_checkpointing import Recompute, checkpoint_activations
from megatron_bipe.model.attention import Attention
from megatron_bipe.model.fused import compile_fused
from megatron_bipe.model.layer_factory import HeadExchange, LayerFactory, NoExchange, shard_of
from megatron_bipe.model.loss import token_losses
from megatron_bipe.model.norm_and_gate import GateFunction, RMSNormFunction
from megatron_bipe.model.positions.absolute import (
    evenly_spaced_position_ids,
    random_position_ids,
    token_position_ids,
)
from megatron_bipe.model.positions.base import Prepared, PreparedPositions, make_absolute

TOKEN_EMBEDDING = "0.token.weight"  # name of the token embedding in the plan


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its kind, and a function that builds it with its initial weights."""

    index: int
    kind: str
    build: Callable[[], nn.Module]


def make_plan(
    config: ModelConfig, seed: int, layers: LayerFactory | None = None, recompute: Recompute = "none"
) -> list[LayerPlan]:
    """Return the layers of the model in order; nothing is allocated until a layer is built."""
    factory = layers or LocalLayers()
    run_block = checkpoint_activations(Block.residuals, recompute)
    if factory.compiles:
        run_block = compile_fused(run_block)
    block = partial(Block, config, factory, run_block, PreparedPositions())
    kinds: list[tuple[str, Callable[[], nn.Module]]] = [
        ("Embedding", partial(Embedding, config, factory, seed)),
        *[("Block", block)] * config.num_layers,
        ("Head", partial(Head, config, factory)),
    ]

    def build(index: int) -> nn.Module:
        layer = kinds[index][1]()
        init_layer(layer, index, config, seed)
        if config.tied_output and isinstance(layer, Head):
            init_tied_copy(layer, embedding=build(0))
        return layer

    return [LayerPlan(index, kind, partial(build, index)) for index, (kind, _) in enumerate(kinds)]


def build_model(
    config: ModelConfig, seed: int = 0, layers: LayerFactory | None = None, recompute: Recompute = "none"
) -> nn.Sequential:
    """Build the full model in one process: (tokens, intra, inter) int64 [B, T] each -> logits [B, T, V]."""
    model = nn.Sequential(*(layer.build() for layer in make_plan(config, seed, layers, recompute)))
    if config.tied_output:
        tie(model[-1], embedding=model[0])
    return model


def count_parameters(config: ModelConfig, layers: LayerFactory | None = None) -> list[int]:
    """Return the number of parameters of each layer of the plan, in order, on a rank whose factory is `layers`.

    The weight of a tied output is counted once, in layer 0. No memory is allocated.
    """
    with torch.device("meta"), _NoInitialization():
        built = [layer.build() for layer in make_plan(config, seed=0, layers=layers)]
    return [sum(p.numel() for p in layer.parameters() if not copy_source(p)) for layer in built]


class _NoInitialization(TorchFunctionMode):
    """Mode that skips `torch.nn.init`; on the meta device, it would import torch._dynamo, which takes seconds."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", "") == nn.init.__name__:
            return (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


def train_flops_per_token(config: ModelConfig, seq_len_tokens: int) -> int:
    """Return the FLOPs of forward and backward for one token of a sequence, without recomputation.

    Each matrix weight costs two per token in forward and four in backward. Of the attention scores and the weighted
    sums of values, only the causal half is counted. Embedding lookups, norms and softmax are not counted.
    """
    heads_width = config.num_heads * config.head_width
    attention_weights = config.hidden_size * (2 * config.num_heads + 2 * config.kv_heads) * config.head_width
    block_weights = attention_weights + 3 * config.hidden_size * config.ffn_size
    weights = config.num_layers * block_weights + config.hidden_size * config.vocab_size
    scores_and_mixing = config.num_layers * 2 * heads_width * seq_len_tokens // 2
    return 3 * 2 * (weights + scores_and_mixing)


class Embedding(nn.Module):
    """Token embedding and the absolute part of the encoding; also returns the positions that attention encodes.

    Args:
        config: model configuration.
        layers: factory of the embeddings.
        seed: seed of the run, for randomized positions.
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory, seed: int = 0) -> None:
        super().__init__()
        self._config, self._own, self._seed = config, layers.exchange.local_positions, seed
        self.token = layers.vocab_embedding(config.vocab_size, config.hidden_size, -1 if config.zero_last_row else None)
        absolute = make_absolute(config, layers)
        self.intra = absolute if config.bilevel else None
        self.place = None if config.bilevel else absolute

    def forward(self, ids: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Map (tokens, intra ids, inter ids), each int64 [B, T], to (hidden [B, t, D], positions int64 [B, T]).

        The returned positions, which attention encodes, are inter-segment ids or token positions. They cover all T
        positions on every rank, since attention sees unsharded sequences.

        Raises:
            ConfigError: the sequences are longer than the encoding allows.
        """
        tokens_BT, intra_BT, inter_BT = ids
        self._check_length(tokens_BT.shape[1])
        hidden_BtD = self.token(self._own(tokens_BT))
        if self._config.bilevel:
            return _sum(hidden_BtD, self.intra, self._own(intra_BT)), inter_BT
        positions_BT = self._positions(tokens_BT)
        return _sum(hidden_BtD, self.place, self._own(positions_BT)), positions_BT

    def _check_length(self, num_tokens: int) -> None:
        config, longest = self._config, self._config.max_seq_len_tokens
        if longest is not None and num_tokens > longest:
            raise ConfigError(
                f"a sequence of {num_tokens} tokens exceeds the limit of {longest} of model.encoding={config.encoding}",
                remedy="Use a shorter sequence length",
                location="train.seq_len_tokens or --lengths",
            )

    def _positions(self, tokens_BT: Tensor) -> Tensor:
        config = self._config
        if config.parts.positions == "tokens":
            return token_position_ids(tokens_BT)
        if self.training:
            return random_position_ids(tokens_BT, config.drawn_range, self._seed)
        return evenly_spaced_position_ids(tokens_BT, config.drawn_range, config.train_len_tokens)


def _sum(hidden_BtD: Tensor, absolute: nn.Module | None, positions_Bt: Tensor) -> Tensor:
    return hidden_BtD if absolute is None else hidden_BtD + absolute(positions_Bt).to(hidden_BtD.dtype)


class Block(nn.Module):
    """A pre-norm block: attention and feed-forward, each added to the residual stream.

    Args:
        config: model configuration.
        layers: factory of the layers.
        run: runs `residuals` of a block; all blocks share it, so that it is compiled once.
        prepared_positions: tensors that all blocks share.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerFactory,
        run: Callable[..., Tensor],
        prepared_positions: PreparedPositions,
    ) -> None:
        super().__init__()
        self._run, self._prepared_positions = run, prepared_positions
        self.attention_norm = layers.norm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layers)
        self.mlp_norm = layers.norm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config, layers)

    def forward(self, payload: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Map (hidden [B, T, D], positions int64 [B, T]) to the same, with positions unchanged."""
        hidden_BTD, positions_BT = payload
        prepared = self._prepared_positions.prepared(self.attention.prepare, positions_BT, hidden_BTD.dtype)
        return self._run(self, hidden_BTD, positions_BT, prepared), positions_BT

    def residuals(self, hidden_BTD: Tensor, positions_BT: Tensor, prepared: Prepared) -> Tensor:
        """Map hidden [B, T, D] to the same; `prepared` is that of `Attention.prepare`."""
        hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD), positions_BT, prepared)
        return hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD))


class SwiGLU(nn.Module):
    """Feed-forward down(silu(gate x) * up x), with gate and up fused in one matrix (gate rows first).

    Source: Shazeer 2020 (arXiv 2002.05202).
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.gate_up = layers.column(config.hidden_size, 2 * config.ffn_size, blocks=2)
        self.down = layers.row(config.ffn_size, config.hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        gate_up_BTf = self.gate_up(hidden_BTD)
        if torch.compiler.is_compiling():
            gate_BTf, up_BTf = gate_up_BTf.chunk(2, dim=-1)
            return self.down(F.silu(gate_BTf) * up_BTf)
        return self.down(GateFunction.apply(gate_up_BTf))  # type: ignore[no-untyped-call]


class RMSNorm(nn.Module):
    """Root-mean-square norm, x / rms(x) * weight over the last dimension; no mean, no bias.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return rms_norm(hidden_BTD, self.weight, self.eps)


def rms_norm(hidden_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Compute the RMS norm in fp32, bit-identical to torch's.

    On a GPU torch has one kernel for it. On a CPU it is a chain of operations, which compiled code fuses.
    """
    if hidden_BTD.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        normed: Tensor = RMSNormFunction.apply(hidden_BTD, weight_D, eps)  # type: ignore[no-untyped-call]
        return normed
    return F.rms_norm(hidden_BTD, weight_D.shape, weight_D, eps)


class Head(nn.Module):
    """Final norm and projection to the vocabulary."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.norm = layers.norm(config.hidden_size, config.norm_eps)
        self.output = layers.output(config.hidden_size, config.vocab_size)

    def forward(self, payload: tuple[Tensor, Tensor]) -> Tensor:
        """Map (hidden [B, T, D], positions) to logits [B, T, V] in the model's dtype, or to this rank's shard."""
        hidden_BTD, _ = payload
        return self.output(self.norm(hidden_BTD))


# Tied output
#
# If one rank has both layers, they share one parameter. If they are on different pipeline stages, the head has a copy,
# which is initialized from the embedding and receives the same gradient, the sum of both, at every update.
# The copy is not a parameter of the model: checkpoints, the gradient norm and parameter counts skip it.


def tie(head: Any, embedding: Any) -> None:
    """Make both layers use one parameter."""
    head.output.weight = embedding.token.weight


def init_tied_copy(head: Any, embedding: Any) -> None:
    """Initialize the head's weight with a copy of the embedding's, and mark it as a copy."""
    with torch.no_grad():
        head.output.weight.copy_(embedding.token.weight)
    head.output.weight.copy_of = TOKEN_EMBEDDING


def copy_source(parameter: Tensor) -> str | None:
    """Return the name, in the plan, of the parameter that this one copies; None if it is not a copy."""
    name: str | None = getattr(parameter, "copy_of", None)
    return name


def init_layer(layer: nn.Module, index: int, config: ModelConfig, seed: int) -> None:
    """Initialize one layer of the plan in place: matrices from N(0, init_std), norm weights with ones.

    Full parameters are drawn in fp32 on the CPU, in definition order, so that the values depend neither on the device
    nor on the layers of this rank nor on their sharding. Layers on the meta device are skipped.
    """
    generator = torch.Generator().manual_seed(layer_seed(seed, index))
    for parameter in layer.parameters():
        if parameter.is_meta:
            continue
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                shard = shard_of(parameter)
                shape = shard.full_shape(parameter.shape) if shard else parameter.shape
                full = torch.randn(shape, generator=generator) * config.init_std
                parameter.copy_(shard.select(full) if shard else full)
    for module in layer.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and not module.weight.is_meta:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


def layer_seed(seed: int, index: int) -> int:
    """Return the 63-bit seed of layer `index`: a hash, so that neighboring layers and runs are independent."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class LocalLayers:
    """A `LayerFactory` of unsharded torch layers; `exchange` shards the sequences if there is context parallelism."""

    rank, ranks = 0, 1

    def __init__(self, exchange: HeadExchange | None = None, *, compiles: bool = False) -> None:
        self.exchange, self.compiles = exchange or NoExchange(), compiles

    def column(self, width_in: int, width_out: int, blocks: int = 1) -> nn.Module:
        del blocks
        return nn.Linear(width_in, width_out, bias=False)

    def gather_columns(self, x_BTF: Tensor) -> Tensor:
        return x_BTF

    def row(self, width_in: int, width_out: int) -> nn.Module:
        return nn.Linear(width_in, width_out, bias=False)

    def vocab_embedding(self, rows: int, width: int, padding_row: int | None) -> nn.Module:
        return nn.Embedding(rows, width, padding_idx=padding_row)

    def replicated_embedding(self, rows: int, width: int, padding_row: int | None) -> nn.Module:
        return nn.Embedding(rows, width, padding_idx=padding_row)

    def local_sequence_ids(self, ids_Bt: Tensor) -> Tensor:
        return ids_Bt

    def per_head_embedding(self, rows: int, num_heads: int) -> nn.Module:
        return nn.Embedding(rows, num_heads)

    def norm(self, width: int, eps: float) -> nn.Module:
        return RMSNorm(width, eps)

    def output(self, width_in: int, rows: int) -> nn.Module:
        return nn.Linear(width_in, rows, bias=False)

    def token_losses(self, logits_BtV: Tensor, labels_BT: Tensor) -> Tensor:
        return token_losses(logits_BtV, self.exchange.local_positions(labels_BT), compiles=self.compiles)
