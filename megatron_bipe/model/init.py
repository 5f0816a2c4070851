"""Initial weights: those of layer k depend on the run's seed and on k, and on nothing else."""

import hashlib

import torch
from torch import nn

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layer_factory import shard_of


def init_layer(layer: nn.Module, index: int, config: ModelConfig, seed: int) -> None:
    """Fill one layer of the plan in place: matrices from N(0, init_std), norm weights with ones.

    Drawn whole, on the CPU, in fp32, parameter by parameter in definition order, so that neither the device nor the
    number of layers on this rank nor how they are split matters. Layers on the meta device are left alone.
    """
    generator = torch.Generator().manual_seed(layer_seed(seed, index))
    for parameter in layer.parameters():
        if parameter.is_meta:
            continue
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                share = shard_of(parameter)
                shape = share.whole_shape(parameter.shape) if share else parameter.shape
                whole = torch.randn(shape, generator=generator) * config.init_std
                parameter.copy_(share.of(whole) if share else whole)
    for module in layer.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and not module.weight.is_meta:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


def layer_seed(seed: int, index: int) -> int:
    """Seed of layer `index`, 63 bits; a hash, so that neighbouring layers and runs share nothing."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
