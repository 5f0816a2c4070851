"""Loading and verification of an exported model, as the training model that every evaluation runs on."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megatron_bipe.config import ModelConfig
from megatron_bipe.errors import CheckpointError
from megatron_bipe.hf.checksums import check_files
from megatron_bipe.hf.hf_config import rope_fields
from megatron_bipe.hf.stock_llama import is_stock_llama, own_weights, stock_llama_config
from megatron_bipe.hf.weight_mapping import from_llama
from megatron_bipe.io import check_inner_name
from megatron_bipe.model import TOKEN_EMBEDDING, build_model, tie

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_REMEDY = "Export the checkpoint again with tools/export_hf.py"


class LoadedModel(NamedTuple):
    """An exported model on the CPU."""

    model: nn.Sequential
    """(tokens, intra, inter) int64 [B, T] -> logits [B, T, V]."""
    config: ModelConfig
    dtype: torch.dtype
    """Dtype of the stored weights and of `model`."""
    data: dict[str, Any] | None
    """tokenizer_fingerprint and special_in_text (both may be None), segments_spec, token_ids of the training data;
    None: not recorded."""


def load_exported(folder: str | Path) -> LoadedModel:
    """Load an exported folder or a stock LLaMA; only weights and settings are read, and no remote code runs.

    Raises:
        CheckpointError: the folder is not an exported model, or is incomplete or damaged.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    files = weight_files(folder)
    check_files(folder, [CONFIG, *files])
    config = model_config(settings, folder / CONFIG)
    weights = read_safetensors(folder, files)
    if is_stock_llama(settings):
        weights = own_weights(weights, config)
    model = build_from_llama(weights, config, folder)
    return LoadedModel(model, config, next(model.parameters()).dtype, data_fields(settings, folder / CONFIG))


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's `config.json`.

    Raises:
        CheckpointError: the file is missing or is not a JSON object, or the folder also has an adapter of PEFT.
    """
    path = folder / CONFIG
    if (folder / _ADAPTER).is_file():  # transformers would apply it, to a model of any other folder that it names
        raise CheckpointError(
            f"the folder has an adapter of PEFT ({_ADAPTER}), which is not a part of the model",
            remedy="Merge it (merge_and_unload) and save the result with save_pretrained, or move it to its own folder",
            location=folder,
        )
    if not path.is_file():
        raise CheckpointError(f"there is no {CONFIG}", remedy="Give the folder of an exported model", location=folder)
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{CONFIG} is not JSON: {error}", remedy=_REMEDY, location=path) from error
    if not isinstance(settings, dict):
        what = f"{CONFIG} is a JSON {type(settings).__name__}, not an object"
        raise CheckpointError(what, remedy=_REMEDY, location=path)
    return settings


def model_config(settings: Mapping[str, Any], location: Path) -> ModelConfig:
    """Return the model configuration that an exported `config.json` describes.

    Raises:
        CheckpointError: another kind of model, a missing key, an impossible value or no segment rule.
    """
    if is_stock_llama(settings):
        return stock_llama_config(settings, location)
    kind, encoding = settings.get("model_type"), settings.get("encoding")
    if kind not in ("bipe", "llama") or encoding is None or (kind == "llama" and encoding != "rope"):
        published = "rpe_type" in settings
        raise CheckpointError(
            f"model_type {kind!r} with {'rpe_type' if published else 'encoding'} "
            f"{settings.get('rpe_type') if published else encoding!r} is not a model that this project exports",
            remedy="Convert the authors' models with tools/import_hf.py"
            if published
            else "Give a folder of tools/export_hf.py, or of a LlamaForCausalLM",
            location=location,
        )
    try:
        config = ModelConfig(
            encoding=encoding,
            **llama_shape(settings),
            intra_size=settings["intra_size"],
            train_len_tokens=settings["train_len_tokens"],
            init_std=settings["initializer_range"],
            intra_encoding=settings.get("intra_encoding", "learned"),
            position_range=settings.get("position_range"),
            **rope_fields(settings),
            log_scale=settings.get("log_scale", False),
            zero_last_row=settings.get("zero_last_row", False),
            tied_output=settings.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise CheckpointError(f"key {error} is missing", remedy=_REMEDY, location=location) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, not {first['input']!r}"
        raise CheckpointError(f"impossible value for {what}", remedy=_REMEDY, location=location) from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"a key has the wrong form: {error}", remedy=_REMEDY, location=location) from error
    if config.bilevel and data_fields(settings, location) is None:
        raise CheckpointError(
            f"encoding {encoding!r} requires a segment rule, and there is none",
            remedy='Add the rule of the training data as "segments": {"spec": ..., "token_ids": [...]}',
            location=location,
        )
    return config


def llama_shape(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that have LLaMA's keys in every layout.

    Raises:
        KeyError: a key is missing.
    """
    return {
        "num_layers": settings["num_hidden_layers"],
        "hidden_size": settings["hidden_size"],
        "num_heads": settings["num_attention_heads"],
        "num_kv_heads": settings.get("num_key_value_heads"),
        "ffn_size": settings["intermediate_size"],
        "vocab_size": settings["vocab_size"],
        "norm_eps": settings["rms_norm_eps"],
    }


def data_fields(settings: Mapping[str, Any], location: Path) -> dict[str, Any] | None:
    """Return the facts about the training data in `config.json`; None without a segment rule."""
    rule = settings.get("segments")
    if rule is None:
        return None
    try:
        fields = {"segments_spec": str(rule["spec"]), "token_ids": tuple(int(token) for token in rule["token_ids"])}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"segments {rule!r} is not a segment rule",
            remedy='Write it as {"spec": name of the rule, "token_ids": [its separators]}',
            location=location,
        ) from error
    return {name: settings.get(name) for name in ("tokenizer_fingerprint", "special_in_text")} | fields


def shard_names(index: Path, remedy: str) -> list[str]:
    """Return the sorted file names in an index of shards, all of which are inside its folder."""
    try:
        return sorted(map(check_inner_name, set(json.loads(index.read_text("utf-8"))["weight_map"].values())))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"the index of shards is damaged: {error}", remedy=remedy, location=index) from error


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files with a model's weights: one file or else, as in transformers, an index and shards.

    Raises:
        CheckpointError: the index is damaged, or a file is missing.
    """
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        names = [INDEX, *shard_names(folder / INDEX, _REMEDY)]
    for name in names:
        if not (folder / name).is_file():
            pickled = any(folder.glob("pytorch_model*.bin"))
            remedy = "Save it as safetensors with save_pretrained of transformers" if pickled else _REMEDY
            raise CheckpointError(f"the weights {name} are missing", remedy=remedy, location=folder)
    return names


def read_safetensors(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Read all weights of a model folder from the safetensors files among `names`, which the caller has verified."""
    weights: dict[str, Tensor] = {}
    for file in (folder / name for name in names if name != INDEX):
        try:
            with safe_open(str(file), framework="pt") as shard:
                weights.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"the weights cannot be read: {error}", remedy=_REMEDY, location=file) from error
    return weights


def build_from_llama(
    llama_weights: Mapping[str, Tensor], config: ModelConfig, location: str | Path = ""
) -> nn.Sequential:
    """Build the training model from weights with LLaMA names, without copies where the layout allows it.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape.
    """
    with torch.device("meta"):  # no memory, no random numbers
        model = build_model(config)
    try:
        model.load_state_dict(from_llama(llama_weights, config, location), assign=True)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"the weights do not fit the configuration: {text[:300]}",
            remedy="Check that the weights and the configuration belong to the same model",
            location=location,
        ) from error
    if config.tied_output:  # assignment made two parameters of the tensor
        tie(model[-1], embedding=model[0])
    return model.eval()


def load_layer(
    layer: nn.Module, index: int, weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype
) -> nn.Module:
    """Load weights, rounded to `dtype` and converted to fp32, into layer `index` built on the meta device."""
    own = {}
    for name in layer.state_dict():
        tied = config.tied_output and index == config.num_layers + 1 and name == "output.weight"
        own[name] = weights[TOKEN_EMBEDDING if tied else f"{index}.{name}"].to(dtype).float()
    layer.load_state_dict(own, assign=True)
    return layer.eval()
