"""Conversion of RoPE's base and scaling to and from the form of transformers' `config.json`."""

from collections.abc import Mapping
from typing import Any

from megatron_bipe.config.schema import ModelConfig, RopeScaling
from megatron_bipe.model.positions.functional import stretched_base

# transformers has no NTK type: the model is stored with an increased base, and this key stores the original values.
_NTK = "rope_ntk"
_YARN_FIELDS = ("beta_fast", "beta_slow", "attention_factor")


def rope_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of `config.json` for base and scaling."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base}}
    if scaling.type == "ntk":
        raised = {
            "rope_type": "default",
            "rope_theta": stretched_base(config.rope_base, config.head_width, scaling.factor),
        }
        return {"rope_parameters": raised, _NTK: {"rope_theta": config.rope_base, "factor": scaling.factor}}
    parameters = {"rope_type": scaling.type, "rope_theta": config.rope_base, "factor": scaling.factor}
    if scaling.type == "yarn":
        parameters["original_max_position_embeddings"] = scaling.original_positions or config.train_len_tokens
        fields = {name: getattr(scaling, name) for name in _YARN_FIELDS}
        parameters |= {name: value for name, value in fields.items() if value is not None}
    return {"rope_parameters": parameters}


def rope_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that the keys describe.

    Raises:
        KeyError, TypeError, ValidationError: a key is missing, has the wrong type, or an impossible value.
    """
    rope = settings.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0}
    if (ntk := settings.get(_NTK)) is not None:
        return {"rope_base": ntk["rope_theta"], "rope_scaling": RopeScaling(type="ntk", factor=ntk["factor"])}
    kind, scaling = rope["rope_type"], None
    if kind == "yarn":
        original = rope["original_max_position_embeddings"]
        fields = {name: rope[name] for name in _YARN_FIELDS if rope.get(name) is not None}
        fields["original_positions"] = None if original == settings["train_len_tokens"] else original
        scaling = RopeScaling(type=kind, factor=rope["factor"], **fields)
    elif kind != "default":
        scaling = RopeScaling(type=kind, factor=rope["factor"])
    return {"rope_base": rope["rope_theta"], "rope_scaling": scaling}
