"""Settings of an exported model (config.json and generation_config.json) and their conversion from `ModelConfig`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from megatron_bipe.config import ModelConfig, RopeScaling
from megatron_bipe.model.positions.functional import stretched_base

# transformers has no NTK type: the model is stored with an increased base, and this key stores the original values.
_NTK = "rope_ntk"
_YARN_FIELDS = ("beta_fast", "beta_slow", "attention_factor")


class DataFields(NamedTuple):
    """Facts about the training data that an exported model records."""

    segments_spec: str
    token_ids: Sequence[int]
    """Separator ids of the rule; empty for fixed:N."""
    tokenizer_fingerprint: str | None
    """SHA-256 of the tokenizer's definition; None if no tokenizer is known."""
    special_ids: Mapping[str, int]
    """Token ids by role (bos, eos, unk, pad), if they exist."""
    special_in_text: bool | None = None
    """True if names of special tokens in the text became these tokens; None: not recorded."""


def with_padding(special_ids: Mapping[str, int]) -> dict[str, int]:
    """Return the ids by role with one for padding: that of the tokenizer, else `unk`, else `eos`.

    A text tokenized with byte fallback has no `unk`. `eos` is the second choice, because collators of training exclude
    the padding token from the loss, so that a model which is fine-tuned with it does not learn to end a text.
    """
    pad_id = next((special_ids[role] for role in ("pad", "unk", "eos") if role in special_ids), None)
    return dict(special_ids) if pad_id is None else {**special_ids, "pad": pad_id}


def is_stock(config: ModelConfig) -> bool:
    """Return True if transformers' own `LlamaForCausalLM` computes the same function.

    It does not for dynamic scaling: it uses one base for a full batch and keeps that of the longest input seen.
    """
    dynamic = config.rope_scaling is not None and config.rope_scaling.type == "dynamic"
    return config.encoding == "rope" and not config.log_scale and not dynamic


def hf_settings(config: ModelConfig, data: DataFields, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of `config.json`; a stock model has the same extra keys, which LLaMA ignores."""
    stock = is_stock(config)
    name = "Llama" if stock else "Bipe"
    special_ids = with_padding(data.special_ids)
    settings: dict[str, Any] = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        **rope_settings(config),
        "encoding": config.encoding,
        "intra_encoding": config.intra_encoding,
        "position_range": config.position_range,
        "intra_size": config.intra_size,
        "train_len_tokens": config.train_len_tokens,
        "log_scale": config.log_scale,
        "zero_last_row": config.zero_last_row,
        "segments": {"spec": data.segments_spec, "token_ids": list(data.token_ids)},
        "tokenizer_fingerprint": data.tokenizer_fingerprint,
        "special_in_text": data.special_in_text,
        "tie_word_embeddings": config.tied_output,
        **{f"{role}_token_id": special_ids.get(role) for role in ("bos", "eos", "pad")},
    }
    if stock:
        more = {"max_position_embeddings": _max_position_embeddings(config), "hidden_act": "silu"}
        return settings | _rope_of_version_4(settings) | more | {"attention_bias": False, "mlp_bias": False}
    code = {"AutoConfig": "configuration_bipe.BipeConfig", "AutoModel": "modeling_bipe.BipeModel"}
    for task in ("CausalLM", "SequenceClassification"):
        code[f"AutoModelFor{task}"] = f"modeling_bipe.BipeFor{task}"
    return settings | {"auto_map": code}


def generation_settings(config: ModelConfig, data: DataFields) -> dict[str, Any]:
    """Return the content of `generation_config.json`."""
    special_ids = with_padding(data.special_ids)
    settings: dict[str, Any] = {f"{r}_token_id": special_ids[r] for r in ("bos", "eos", "pad") if r in special_ids}
    dynamic = config.rope_scaling is not None and config.rope_scaling.type == "dynamic"
    if dynamic or config.parts.positions == "drawn":
        settings["use_cache"] = False  # beyond the training length each new token changes every cached key
    return settings


def _max_position_embeddings(config: ModelConfig) -> int:
    """Return the longest input to declare; for YaRN the scaled length, as transformers defines the field."""
    scaling = config.rope_scaling
    if scaling is None or scaling.type != "yarn":
        return config.train_len_tokens
    return int((scaling.original_positions or config.train_len_tokens) * scaling.factor)


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
    elif scaling.original_positions is not None:
        parameters["original_max_position_embeddings"] = scaling.original_positions
    return {"rope_parameters": parameters}


def _rope_of_version_4(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return base and scaling in the keys of transformers 4 and of programs that read them as it does."""
    rope = dict(settings["rope_parameters"])
    return {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if rope["rope_type"] == "default" else rope}


def _rope_parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return base and scaling in the form of `rope_parameters`, from either spelling.

    Raises:
        ValueError: both are there and differ, so that programs would compute different models.
    """
    scaling = settings.get("rope_scaling") or {"rope_type": "default"}
    old = {"rope_theta": settings.get("rope_theta", 10000.0), **scaling}
    old.setdefault("rope_type", old.pop("type", None))
    new: dict[str, Any] = settings.get("rope_parameters") or old
    if "rope_theta" in settings and new != old:
        raise ValueError(f"rope_parameters {new} and rope_theta, rope_scaling {old} differ")
    return new


def rope_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that the keys describe.

    Raises:
        KeyError, TypeError, ValueError: a key is missing, has the wrong type, or an impossible value.
    """
    rope = _rope_parameters(settings)
    if (ntk := settings.get(_NTK)) is not None:
        return {"rope_base": ntk["rope_theta"], "rope_scaling": RopeScaling(type="ntk", factor=ntk["factor"])}
    kind, scaling = rope["rope_type"], None
    if kind == "yarn":
        original = rope["original_max_position_embeddings"]
        fields = {name: rope[name] for name in _YARN_FIELDS if rope.get(name) is not None}
        fields["original_positions"] = None if original == settings["train_len_tokens"] else original
        scaling = RopeScaling(type=kind, factor=rope["factor"], **fields)
    elif kind == "dynamic":
        original = rope.get("original_max_position_embeddings")
        scaling = RopeScaling(type=kind, factor=rope["factor"], original_positions=original)
    elif kind != "default":
        scaling = RopeScaling(type=kind, factor=rope["factor"])
    return {"rope_base": rope["rope_theta"], "rope_scaling": scaling}
