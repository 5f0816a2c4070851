"""Reader of the authors' published models: returns weights under our names and a model configuration.

Their `config.json` has `model_type: llama` and `rpe_type`; weight names are LLaMA's, the intra-segment embedding is
`model.embeds.0.weight`, and the ALiBi models store their slopes as a buffer in every layer.
"""

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_bipe.config import ModelConfig, RopeScaling
from megatron_bipe.errors import CheckpointError
from megatron_bipe.hf.checksums import check_files
from megatron_bipe.hf.load import (
    CONFIG,
    INDEX,
    WEIGHTS,
    llama_shape,
    read_safetensors,
    read_settings,
    shard_names,
    weight_files,
)
from megatron_bipe.hf.weight_mapping import INTRA_EMBEDDING, from_llama

# Separator ids that are fixed in the authors' code: LLaMA's newline byte and its period after a space. They are the
# rule of all published models, for folders without a tokenizer.
PUBLISHED_SEPARATORS = (13, 869)

# Also fixed in their code: rows of the intra-segment embedding that it reads, and the base of RoPE.
_READ_ROWS, _ROPE_BASE = 1024, 10000.0
_TRAIN_SCALE, _MAX_POSITIONS = 256, 2048  # defaults of their configuration class

_ENCODINGS, _SCALINGS = ("bipe_rope", "bipe_alibi", "rope", "alibi"), ("linear", "dynamic")
_INTRA_TABLE = "model.embeds.0.weight"
_BUFFERS = ("self_attn.alibi", "self_attn.rotary_emb.inv_freq")  # recomputed, not learned
_ROTARY = ("bipe_rope", "rope")  # rope_scaling has no effect on the others
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_REMEDY = "Give a folder in the authors' layout, e.g. a download of hzy00/BiPE_RoPE-151M"
_log = logging.getLogger(__name__)


class AuthorsModel(NamedTuple):
    """Content of a published model."""

    weights: dict[str, Tensor]
    """Weights under the training model's names, in the published precision."""
    config: ModelConfig
    dtype: torch.dtype


def read_authors_checkpoint(folder: Path) -> AuthorsModel:
    """Read a folder in the authors' layout.

    Raises:
        CheckpointError: the layout differs, the folder is incomplete or damaged, or our model lacks a feature of it.
    """
    settings = read_settings(folder)
    if settings.get("model_type") != "llama" or "rpe_type" not in settings:
        what = f"model_type {settings.get('model_type')!r}, rpe_type {settings.get('rpe_type')!r}"
        raise CheckpointError(f"{what} is not the authors' layout", remedy=_REMEDY, location=folder / CONFIG)
    raw = _read_weights(folder)
    weights = {name.replace(_INTRA_TABLE, INTRA_EMBEDDING): t for name, t in raw.items() if not name.endswith(_BUFFERS)}
    has_unread_rows = _cut_intra_table(weights, folder)
    config = _model_config(settings, weights, folder / CONFIG)
    if has_unread_rows:  # the untrained last row was cut off
        config = config.model_copy(update={"zero_last_row": False})
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) != 1:
        raise CheckpointError(f"the weights have several dtypes: {dtypes}", remedy=_REMEDY, location=folder)
    try:
        renamed = from_llama(weights, config, folder)
    except RuntimeError as error:  # torch: rows cannot be split as the configuration requires
        what = f"the weights do not fit the configuration: {' '.join(str(error).split())}"
        raise CheckpointError(what, remedy=_REMEDY, location=folder / CONFIG) from error
    return AuthorsModel(renamed, config, dtypes.pop())


def _cut_intra_table(weights: dict[str, Tensor], folder: Path) -> bool:
    """Remove the rows of the intra-segment embedding that the authors' code never reads; return True if there are any.

    Their code clips intra-segment ids to 1023, whatever the size of the embedding; ours clips them to its last row.
    """
    num_rows = len(weights.get(INTRA_EMBEDDING, ()))
    if num_rows <= _READ_ROWS:
        return False
    weights[INTRA_EMBEDDING] = weights[INTRA_EMBEDDING][:_READ_ROWS].clone()
    _log.warning(
        "%s: removing rows %d to %d of the intra-segment embedding, which the authors' code never reads",
        folder,
        _READ_ROWS,
        num_rows - 1,
    )
    return True


def _model_config(settings: Mapping[str, Any], weights: Mapping[str, Tensor], location: Path) -> ModelConfig:
    encoding, train_len = settings["rpe_type"], settings.get("train_scale", _TRAIN_SCALE)
    scaling = settings.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, dict):
        raise CheckpointError(f"rope_scaling is {scaling!r}, not an object", remedy=_REMEDY, location=location)
    kinds = {
        "rpe_type": (encoding, _ENCODINGS),
        "rope_scaling": (scaling and scaling.get("type"), (None, *_SCALINGS)),
        "hidden_act": (settings.get("hidden_act", "silu"), ("silu",)),
    }
    if wrong := [f"{key} {found!r}" for key, (found, known) in kinds.items() if found not in known]:
        raise CheckpointError(f"a key has an unsupported value: {', '.join(wrong)}", remedy=_REMEDY, location=location)
    if settings.get("tie_word_embeddings"):
        raise CheckpointError("tied embeddings are not supported", remedy=_REMEDY, location=location)
    if (base := settings.get("rope_theta", _ROPE_BASE)) != _ROPE_BASE:
        _log.warning("%s: ignoring rope_theta %s, since the authors' code always uses %g", location, base, _ROPE_BASE)
    try:
        config = ModelConfig(
            encoding=encoding,
            **llama_shape(settings),
            intra_size=len(weights[INTRA_EMBEDDING]) if INTRA_EMBEDDING in weights else 1024,
            train_len_tokens=train_len,
            init_std=settings.get("initializer_range", 0.02),
            rope_base=_ROPE_BASE,
            rope_scaling=_rope_scaling(scaling, settings) if scaling and encoding in _ROTARY else None,
            log_scale=bool(settings.get("log_scale")),
            zero_last_row=settings.get("pad_token_id") == -1,
        )
    except KeyError as error:
        raise CheckpointError(f"key {error} is missing", remedy=_REMEDY, location=location) from error
    except (ValidationError, TypeError) as error:
        what = " ".join(str(error).split())
        raise CheckpointError(f"a key has an unsupported value: {what}", remedy=_REMEDY, location=location) from error
    return config


def _rope_scaling(scaling: Mapping[str, Any], settings: Mapping[str, Any]) -> RopeScaling:
    """Return the scaling; the dynamic one starts at `max_position_embeddings`, in tokens."""
    if scaling["type"] != "dynamic":
        return RopeScaling(**scaling)
    return RopeScaling(**scaling, original_positions=settings.get("max_position_embeddings", _MAX_POSITIONS))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Read safetensors if there are any, else pickles restricted to tensors."""
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        files = weight_files(folder)
        check_files(folder, [CONFIG, *files])
        return read_safetensors(folder, files)
    names = [_BIN]
    if (folder / _BIN_INDEX).is_file():
        names = shard_names(folder / _BIN_INDEX, _REMEDY)
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"there is neither {WEIGHTS} nor {name}", remedy=_REMEDY, location=folder)
    check_files(folder, [CONFIG, *names])
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            weights |= torch.load(folder / name, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise CheckpointError(
                f"the weights cannot be read, or hold more than tensors: {text[:200]}",
                remedy=_REMEDY,
                location=folder / name,
            ) from error
    return weights
