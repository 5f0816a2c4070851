"""Makes the parts of the encoding that a configuration names."""

import importlib
from typing import Any

from torch import nn

from megatron_bipe.config.encodings import ABSOLUTE
from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model.layer_factory import LayerFactory
from megatron_bipe.model.positions.base import RelativeEncoding


def relative_class(config: ModelConfig) -> type[RelativeEncoding]:
    """The class of the relative part."""
    found: type[RelativeEncoding] = _named(config.relative.made_by)
    return found


def make_relative(config: ModelConfig, layers: LayerFactory) -> RelativeEncoding:
    """The relative part of a block, for the query heads of the rank that `layers` is for."""
    return relative_class(config)(config, layers)


def make_absolute(config: ModelConfig, layers: LayerFactory) -> nn.Module | None:
    """The absolute part: places int64 [B, t] -> what is added to the residual stream; None where there is none."""
    made_by = ABSOLUTE[config.parts.absolute]
    return None if made_by is None else _named(made_by)(config, layers)


def _named(made_by: str) -> Any:
    module, _, name = made_by.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)
