"""Warm start: writes the weights of a model as checkpoint 0 of a run, from which `pretrain.py` resumes."""

import json
import logging
import shlex
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bipe.checkpoint.commit import begin, publish
from megatron_bipe.checkpoint.find import list_steps
from megatron_bipe.checkpoint.manifest import CheckpointInfo
from megatron_bipe.checkpoint.shard_files import KINDS, WEIGHT, Fragment, rank_file, write_fragments, write_index
from megatron_bipe.config import ModelConfig, RunConfig
from megatron_bipe.data.blend import open_blend
from megatron_bipe.data.dataset import describe_special_in_text, open_tokenizer, special_in_text_differs
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.eval.eval_model import EvalModel, check_compatible, load_with_master_weights
from megatron_bipe.model import count_parameters
from megatron_bipe.train.run_folder import write_run_folder

_log = logging.getLogger(__name__)

# Fields that may differ between a model and the run that continues it; the weights depend on all others.
_FREE = {"init_std", "train_len_tokens"}
_ADDED = {"log_scale", "rope_scaling"}  # may be added or changed, but a model that was trained with one keeps it


def begin_from_model(run: RunConfig) -> None:
    """Initialize a run without checkpoints with the weights of the model `train.init_from`.

    Raises:
        CheckpointError: the model does not exist, or is incomplete or damaged.
        ConfigError, DataError: as in `start_run`.
    """
    source = run.train.init_from
    if source is not None and not list_steps(run.run_dir):
        start_run(run, *load_with_master_weights(source))


def start_run(run: RunConfig, eval_model: EvalModel, weights: Mapping[str, Tensor]) -> Path:
    """Write the run folder of `run` with a checkpoint of step 0 that holds `weights` and a new optimizer state.

    Args:
        run: run configuration; its data must exist, and its folder must not contain checkpoints.
        eval_model: the model of the weights.
        weights: weights by parameter name.

    Returns:
        The folder of the checkpoint.

    Raises:
        ConfigError: the run is configured for another model; lists every difference.
        CheckpointError: the folder has checkpoints, or the model does not fit the data.
        DataError: the data is missing, or has another tokenizer or segment rule.
    """
    if list_steps(run.run_dir):
        raise CheckpointError("the run already has checkpoints", remedy="Set another run_dir", location=run.run_dir)
    differences = list(_differences(eval_model.config, run.model))
    if differences:
        changes = " ".join(shlex.quote(f"--set=model.{key}={json.dumps(value)}") for key, value, _ in differences)
        raise ConfigError(
            "the run is configured for another model: "
            + "; ".join(
                f"{key} is {value!r} in the model and {other!r} in the run" for key, value, other in differences
            ),
            remedy=f"Add {changes}",
            location=eval_model.source,
        )
    blend = open_blend(run.data, run.train.seq_len_tokens, run.train.seed)
    for dataset in blend.datasets:
        check_compatible(eval_model, dataset)
    _warn_if_special_tokens_change(eval_model, blend.record)
    write_run_folder(run, blend.record, open_tokenizer(blend.datasets[0]))
    return write_step_zero(run, blend.record, weights)


def _warn_if_special_tokens_change(eval_model: EvalModel, data: DataRecord) -> None:
    """Log a warning if this run treats special tokens in text differently, which fine-tuning on chats may intend."""
    before, now = eval_model.special_in_text, data.special_in_text
    if special_in_text_differs(before, now):
        _log.warning(
            "%s was trained on data made %s; the data of this run was made %s, and so will its export be",
            eval_model.source,
            describe_special_in_text(before),
            describe_special_in_text(now),
        )


def _differences(model: ModelConfig, wanted: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    for key, value in _flat(model).items():
        other = _flat(wanted)[key]
        if value != other and key not in _FREE - _built_in(model, wanted) and not (key in _ADDED and other):
            yield key, value, other


def _built_in(model: ModelConfig, wanted: ModelConfig) -> set[str]:
    """Return the fields that the positions or sizes of the encoding, or a scaling that stays, depend on."""
    sizes = {"init_std"} if model.parts.absolute == "sinusoidal" else set()
    scaling = model.rope_scaling
    has_reference = scaling is not None and scaling.type in ("dynamic", "yarn") and scaling.original_positions is None
    depends = model.num_positions or model.log_scale or (has_reference and scaling == wanted.rope_scaling)
    return sizes | ({"train_len_tokens"} if depends else set())


def _flat(model: ModelConfig) -> dict[str, Any]:
    return model.model_copy(update={"num_kv_heads": model.kv_heads}).model_dump(mode="json")


def write_step_zero(run: RunConfig, data: DataRecord | None, weights: Mapping[str, Tensor]) -> Path:
    """Write checkpoint 0 of a run, as before the first update, and return its folder.

    Each layer has its own file, so that only one layer with its optimizer state is in memory at a time.
    """
    num_bytes = sum(count_parameters(run.model)) * len(KINDS) * torch.float32.itemsize
    temporary = begin(run.run_dir, 0, "import", num_bytes)
    by_layer = groupby(sorted(weights, key=_layer_of), key=_layer_of)
    files = {
        rank_file(layer): write_fragments(temporary, layer, [_fragment(name, weights[name]) for name in names], {})
        for layer, names in by_layer
    }
    info = CheckpointInfo(0, 0, {"ranks": 1}, run.model_dump(mode="json"), data, {})
    write_index(temporary, info, files)
    return publish(temporary, run.run_dir, 0, files)


def _layer_of(name: str) -> int:
    return int(name.partition(".")[0])


def _fragment(name: str, weight: Tensor) -> Fragment:
    flat = weight.float().flatten()
    state = {kind: flat if kind == WEIGHT else torch.zeros_like(flat) for kind in KINDS}
    return Fragment(name, tuple(weight.shape), None, 0, state)
