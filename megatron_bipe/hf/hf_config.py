"""Settings of an exported model: config.json and generation_config.json."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.hf.rope_settings import rope_settings


class DataFields(NamedTuple):
    """Facts about the training data that an exported model records."""

    segments_spec: str
    token_ids: Sequence[int]
    """Separator ids of the rule; empty for fixed:N."""
    tokenizer_fingerprint: str | None
    """SHA-256 of the tokenizer's definition; None if no tokenizer is known."""
    special_ids: Mapping[str, int]
    """Token ids by role (bos, eos, unk, pad), if they exist."""


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
        "tie_word_embeddings": config.tied_output,
        **{f"{role}_token_id": data.special_ids.get(role) for role in ("bos", "eos", "pad")},
    }
    if stock:
        more = {"max_position_embeddings": _max_position_embeddings(config), "hidden_act": "silu"}
        return settings | more | {"attention_bias": False, "mlp_bias": False}
    code = {"AutoConfig": "configuration_bipe.BipeConfig", "AutoModel": "modeling_bipe.BipeModel"}
    return settings | {"auto_map": code | {"AutoModelForCausalLM": "modeling_bipe.BipeForCausalLM"}}


def generation_settings(config: ModelConfig, data: DataFields) -> dict[str, Any]:
    """Return the content of `generation_config.json`."""
    settings: dict[str, Any] = {
        f"{r}_token_id": data.special_ids[r] for r in ("bos", "eos", "pad") if r in data.special_ids
    }
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
