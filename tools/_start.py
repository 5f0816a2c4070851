"""A run folder that begins with the weights of a model: checkpoint 0 of a run that `pretrain.py` then continues."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bipe.config.schema import ModelConfig, RunConfig
from megatron_bipe.data.blend import open_blend
from megatron_bipe.data.inspect import open_tokenizer
from megatron_bipe.engine.checkpoint import list_steps, publish
from megatron_bipe.engine.state_files import KINDS, WEIGHT, Fragment, write_fragments, write_index
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.eval.subject import Subject, check_suits
from megatron_bipe.train.run_folder import write_run_folder

# What may differ between a model and the run that continues it; all else is built into the weights.
_FREE = {"init_std", "train_len_tokens", "log_scale", "rope_scaling"}


def start_run(run: RunConfig, subject: Subject, weights: Mapping[str, Tensor]) -> Path:
    """Write the run folder of `run` with a checkpoint of step 0 that holds `weights`; the optimizer begins anew.

    Args:
        run: its data is read, its folder must have no checkpoints.
        subject: the model that the weights belong to.
        weights: under the plan's names.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError: the run is configured for another model; every difference is named.
        CheckpointError: the folder has checkpoints, or the model does not suit the data.
        DataError: the data is missing, or of another tokenizer or segment rule.
    """
    if list_steps(run.run_dir):
        raise CheckpointError("the run has checkpoints already", remedy="Name another folder", place=run.run_dir)
    differences = list(_differences(subject.config, run.model))
    if differences:
        changes = " ".join(f"--set model.{key}={_yaml(value)}" for key, value, _ in differences)
        raise ConfigError(
            "the run is configured for another model: "
            + "; ".join(
                f"{key} is {value!r} in the model and {other!r} in the run" for key, value, other in differences
            ),
            remedy=f"Give {changes}",
            place=subject.source,
        )
    blend = open_blend(run.data, run.train.seq_len_tokens, run.train.seed)
    for dataset in blend.datasets:
        check_suits(subject, dataset)
    write_run_folder(run, blend.record, open_tokenizer(blend.datasets[0]))
    return write_step_zero(run.run_dir, weights)


def write_step_zero(run_dir: Path, weights: Mapping[str, Tensor]) -> Path:
    """Checkpoint 0 of a run, as pretrain.py would have written it before its first update; returns its folder."""
    return publish(run_dir, 0, lambda folder: _write(folder, weights), _finish, is_main=True, barrier=lambda: None)


def _differences(model: ModelConfig, wanted: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    for key, value in _flat(model).items():
        other = _flat(wanted)[key]
        if key not in _FREE and value != other:
            yield key, value, other


def _flat(model: ModelConfig) -> dict[str, Any]:
    return model.model_copy(update={"num_kv_heads": model.kv_heads}).model_dump(mode="json")


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _write(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """One file a layer, so that one layer with its optimizer state is in memory at a time."""
    names = sorted(weights, key=_layer_of)
    for layer, group in groupby(names, key=_layer_of):
        write_fragments(folder, layer, [_fragment(name, weights[name]) for name in group])


def _layer_of(name: str) -> int:
    return int(name.partition(".")[0])


def _fragment(name: str, weight: Tensor) -> Fragment:
    flat = weight.float().flatten()
    state = {kind: flat if kind == WEIGHT else torch.zeros_like(flat) for kind in KINDS}
    return Fragment(name, tuple(weight.shape), None, 0, state)


def _finish(folder: Path) -> None:
    write_index(folder, 0, 0, {"ranks": 1})
