"""The model, without knowledge of how it is distributed: `transformer` has all layers, `attention` their kernels."""

from megatron_bipe.model.attention import Attention, causal_attention
from megatron_bipe.model.layer_factory import HeadExchange, LayerFactory, NoExchange, Shard, shard_of
from megatron_bipe.model.loss import NUM_PARTS, LossPasses, RowSums, highest_logits, loss_passes, token_losses
from megatron_bipe.model.transformer import (
    TOKEN_EMBEDDING,
    Block,
    LayerPlan,
    LocalLayers,
    RMSNorm,
    build_model,
    copy_source,
    count_parameters,
    make_plan,
    rms_norm,
    tie,
    train_flops_per_token,
)

__all__ = [
    "NUM_PARTS",
    "TOKEN_EMBEDDING",
    "Attention",
    "Block",
    "HeadExchange",
    "LayerFactory",
    "LayerPlan",
    "LocalLayers",
    "LossPasses",
    "NoExchange",
    "RMSNorm",
    "RowSums",
    "Shard",
    "build_model",
    "causal_attention",
    "copy_source",
    "count_parameters",
    "highest_logits",
    "loss_passes",
    "make_plan",
    "rms_norm",
    "shard_of",
    "tie",
    "token_losses",
    "train_flops_per_token",
]
