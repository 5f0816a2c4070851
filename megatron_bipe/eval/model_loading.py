"""A model by what the user calls it: the folder of an exported model, or a run folder, `RUN_DIR[@STEP]`."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_bipe.checkpoint.find import Checkpoint, find_model, read_data_record
from megatron_bipe.checkpoint.shard_files import WEIGHT, StateReader
from megatron_bipe.checkpoint.weights import read_weights
from megatron_bipe.config.load import load_run_config
from megatron_bipe.eval.eval_model import EvalModel, load_exported_model
from megatron_bipe.hf.load import plan_model
from megatron_bipe.hf.weight_mapping import to_llama
from megatron_bipe.model.precision import DTYPES


def load_eval_model(spec: str) -> EvalModel:
    """Load the model that `spec` names.

    Raises:
        CheckpointError: there is none, or it is incomplete or damaged.
    """
    checkpoint = find_model(spec)
    return load_exported_model(Path(spec)) if checkpoint is None else _checkpoint_subject(checkpoint, spec)


def load_with_masters(spec: str) -> tuple[EvalModel, Mapping[str, Tensor]]:
    """The model that `spec` names, and its weights: of a run the fp32 ones that the optimizer works on.

    Raises:
        CheckpointError: as `load_subject`.
    """
    checkpoint = find_model(spec)
    if checkpoint is None:
        eval_model = load_exported_model(Path(spec))
        return eval_model, plan_weights(eval_model)
    return _checkpoint_subject(checkpoint, spec), WeightsOnDisk(checkpoint, torch.float32)


def plan_weights(eval_model: EvalModel) -> dict[str, Tensor]:
    """Weights under the plan's names, as the model has them; a tied output is not named again."""
    return {name: weight.detach() for name, weight in eval_model.model.named_parameters()}


def _checkpoint_subject(checkpoint: Checkpoint, spec: str) -> EvalModel:
    config = load_run_config(checkpoint.run_dir / "config.yaml").model
    model = plan_model(to_llama(read_weights(checkpoint), config), config, checkpoint.folder)
    record = read_data_record(checkpoint.run_dir)
    run_name = checkpoint.run_dir.resolve().name
    name = f"{run_name} step {checkpoint.step:,}" if checkpoint.run_dir != Path(spec) else run_name
    source = f"{checkpoint.run_dir}@{checkpoint.step}"
    return EvalModel(name, source, model, config, record.tokenizer.fingerprint, record.rule)


class WeightsOnDisk(Mapping[str, Tensor]):
    """The weights of a checkpoint, each read when it is asked for, and not kept.

    Args:
        checkpoint: which.
        dtype: of the weights; None: as `read_weights` gives them, in the run's compute precision.
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
