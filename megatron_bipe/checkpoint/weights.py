"""Reads unsharded weights from a checkpoint of any layout."""

from torch import Tensor

from megatron_bipe.checkpoint.find import Checkpoint
from megatron_bipe.checkpoint.shard_files import WEIGHT, StateReader
from megatron_bipe.checkpoint.verify import check_complete
from megatron_bipe.config.load import load_run_config
from megatron_bipe.model.precision import DTYPES


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return all weights by the plan's names, in the run's compute precision, on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    check_complete(checkpoint)
    dtype = DTYPES[load_run_config(checkpoint.run_dir / "config.yaml").train.precision]
    reader = StateReader(checkpoint.folder)
    return {name: reader.full(WEIGHT, name).to(dtype) for name in reader.index.parameters}
