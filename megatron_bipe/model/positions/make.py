"""Builds the absolute and relative parts of the configured encoding."""

import importlib
from typing import Any

from torch import nn

from megatron_bipe.config.encodings import ABSOLUTE
from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory
from megatron_bipe.model.positions.base import RelativeEncoding


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
