"""Configuration of a LLaMA model that other programs made: its folder is read as encoding `rope`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import LlamaConfig

from megatron_bipe.config import ModelConfig, RopeScaling
from megatron_bipe.errors import CheckpointError

_YARN = {"original_max_position_embeddings": "original_positions"} | {
    name: name for name in ("beta_fast", "beta_slow", "attention_factor")
}
_SCALINGS = ("default", "linear", "dynamic", "yarn")
_KEYS_OF_EVERY_TYPE = {"rope_type", "type", "rope_theta", "factor"}
_REMEDY = "Give a LlamaForCausalLM without it, or evaluate the model with transformers or lm-evaluation-harness"


def is_stock_llama(settings: Mapping[str, Any]) -> bool:
    """Return True for a `config.json` of LLaMA that neither this project nor the authors of BiPE wrote."""
    return settings.get("model_type") == "llama" and not {"encoding", "rpe_type"} & settings.keys()


def stock_llama_config(settings: Mapping[str, Any], location: Path) -> ModelConfig:
    """Return the configuration of the same model; absent keys have transformers' defaults.

    Raises:
        CheckpointError: an impossible value, or a feature that the training model lacks.
    """
    try:
        llama: Any = LlamaConfig.from_dict(dict(settings))
        _refuse_unknown(llama, settings, location)
        scaling = _rope_scaling(llama, location)
        trained = llama.max_position_embeddings
        if scaling is not None and scaling.type == "yarn":
            trained = scaling.original_positions
        return ModelConfig(
            encoding="rope",
            num_layers=llama.num_hidden_layers,
            hidden_size=llama.hidden_size,
            num_heads=llama.num_attention_heads,
            num_kv_heads=llama.num_key_value_heads,
            ffn_size=llama.intermediate_size,
            vocab_size=llama.vocab_size,
            norm_eps=llama.rms_norm_eps,
            train_len_tokens=trained,
            init_std=llama.initializer_range,
            rope_base=llama.rope_parameters["rope_theta"],
            rope_scaling=scaling,
            tied_output=llama.tie_word_embeddings,
        )
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        what = " ".join(str(error).split())
        raise CheckpointError(f"a key has an impossible value: {what}", remedy=_REMEDY, location=location) from error


def _refuse_unknown(llama: Any, settings: Mapping[str, Any], location: Path) -> None:
    """Raise CheckpointError for a feature that the training model lacks."""
    head_width = llama.hidden_size // llama.num_attention_heads
    known = {
        "attention_bias": (llama.attention_bias, False),
        "mlp_bias": (llama.mlp_bias, False),
        "hidden_act": (llama.hidden_act, "silu"),
        "head_dim": (llama.head_dim, head_width),
        "partial_rotary_factor": (settings.get("partial_rotary_factor", 1.0), 1.0),
        "quantization_config": (settings.get("quantization_config"), None),
    }
    if others := [f"{key}={found!r}" for key, (found, ours) in known.items() if found != ours]:
        what = f"the model has {', '.join(others)}, which the training model does not support"
        raise CheckpointError(what, remedy=_REMEDY, location=location)


def _rope_scaling(llama: Any, location: Path) -> RopeScaling | None:
    """Return the scaling of positions, from either spelling: transformers has unified them."""
    rope = {key: value for key, value in llama.rope_parameters.items() if value is not None}
    kind = rope.get("rope_type", "default")
    unknown = sorted(set(rope) - _KEYS_OF_EVERY_TYPE - (set(_YARN) if kind == "yarn" else set()))
    if kind not in _SCALINGS or unknown:
        what = f"rope_type {kind!r}" + (f" with {', '.join(unknown)}" if unknown else "")
        raise CheckpointError(f"{what} is not a supported RoPE scaling", remedy=_REMEDY, location=location)
    if kind == "default":
        return None
    fields = {ours: rope[key] for key, ours in _YARN.items() if key in rope} if kind == "yarn" else {}
    if kind == "yarn":
        fields.setdefault("original_positions", llama.max_position_embeddings)
    return RopeScaling(type=kind, factor=rope["factor"], **fields)


def own_weights(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights without the buffers and the copy of a tied output that some programs store."""
    copies = ("rotary_emb.inv_freq", *(("lm_head.weight",) if config.tied_output else ()))
    return {name: weight for name, weight in weights.items() if not name.endswith(copies)}
