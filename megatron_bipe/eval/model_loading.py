"""Loading of a model by the user's specification: an exported folder, or a run folder as `RUN_DIR[@STEP]`."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_bipe.checkpoint.find import Checkpoint, find_model, read_data_record
from megatron_bipe.checkpoint.shard_files import WEIGHT, StateReader
from megatron_bipe.checkpoint.verify import read_weights
from megatron_bipe.config.load import load_run_config
from megatron_bipe.eval.eval_model import EvalModel, load_exported_model
from megatron_bipe.hf.load import build_from_llama
from megatron_bipe.hf.weight_mapping import to_llama
from megatron_bipe.model.precision import DTYPES


def load_eval_model(spec: str) -> EvalModel:
    """Load the model that `spec` names: an exported folder or `RUN_DIR[@STEP]`.

    Raises:
        CheckpointError: there is no such model, or it is incomplete or damaged.
    """
    checkpoint = find_model(spec)
    return load_exported_model(Path(spec)) if checkpoint is None else _load_checkpoint(checkpoint, spec)


def load_with_master_weights(spec: str) -> tuple[EvalModel, Mapping[str, Tensor]]:
    """Load the model that `spec` names, and its weights; for a run the optimizer's fp32 master weights.

    Raises:
        CheckpointError: as for `load_eval_model`.
    """
    checkpoint = find_model(spec)
    if checkpoint is None:
        eval_model = load_exported_model(Path(spec))
        return eval_model, plan_weights(eval_model)
    return _load_checkpoint(checkpoint, spec), LazyCheckpointWeights(checkpoint, torch.float32)


def plan_weights(eval_model: EvalModel) -> dict[str, Tensor]:
    """Return the model's weights by the training model's names; a tied output is named once."""
    return {name: weight.detach() for name, weight in eval_model.model.named_parameters()}


def _load_checkpoint(checkpoint: Checkpoint, spec: str) -> EvalModel:
    config = load_run_config(checkpoint.run_dir / "config.yaml").model
    model = build_from_llama(to_llama(read_weights(checkpoint), config), config, checkpoint.folder)
    record = read_data_record(checkpoint.run_dir)
    run_name = checkpoint.run_dir.resolve().name
    name = f"{run_name} step {checkpoint.step:,}" if checkpoint.run_dir != Path(spec) else run_name
    source = f"{checkpoint.run_dir}@{checkpoint.step}"
    return EvalModel(name, source, model, config, record.tokenizer.fingerprint, record.rule)


class LazyCheckpointWeights(Mapping[str, Tensor]):
    """The weights of a checkpoint, read on access and not cached.

    Args:
        checkpoint: the checkpoint.
        dtype: dtype of the weights; None: the run's compute precision, as in `read_weights`.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
        self._reader = StateReader(checkpoint.folder)
        self._dtype = dtype or DTYPES[load_run_config(checkpoint.run_dir / "config.yaml").train.precision]

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.full(WEIGHT, name).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.index.parameters)

    def __len__(self) -> int:
        return len(self._reader.index.parameters)
