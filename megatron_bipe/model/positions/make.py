"""Builds the absolute and relative parts of the configured encoding."""

import importlib
from typing import Any

from torch import nn

from megatron_bipe.config.encodings import ABSOLUTE
from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory
from megatron_bipe.model.positions.base import RelativeEncoding


def relative_class(config: ModelConfig) -> type[RelativeEncoding]:
    found: type[RelativeEncoding] = _named(config.relative.made_by)
    return found


def make_relative(config: ModelConfig, layers: LayerFactory) -> RelativeEncoding:
    """Make the relative part of one block, for the query heads of the rank of `layers`."""
    return relative_class(config)(config, layers)


def make_absolute(config: ModelConfig, layers: LayerFactory) -> nn.Module | None:
    """Make the absolute part: positions int64 [B, t] -> a term of the residual stream; None if there is none."""
    made_by = ABSOLUTE[config.parts.absolute]
    return None if made_by is None else _named(made_by)(config, layers)


def _named(made_by: str) -> Any:
    module, _, name = made_by.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)
