"""Starts the engine that a layout requires."""

from typing import Any

from megatron_bipe.config.schema import RunConfig
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.engine.interface import Engine
from megatron_bipe.engine.pipeline_engine import PipelineEngine
from megatron_bipe.engine.zero_engine import ZeroEngine
from megatron_bipe.parallel.mesh import Mesh


def start_engine(run: RunConfig, ds_config: dict[str, Any], mesh: Mesh, data: DataRecord | None = None) -> Engine:
    """Start the engine of this rank; waits for all ranks.

    Args:
        run: the validated run configuration.
        ds_config: result of `config.deepspeed.engine_config`.
        mesh: this process among the ranks.
        data: record of the training data, stored in checkpoints.
    """
    kind = PipelineEngine if mesh.pipeline > 1 else ZeroEngine
    return kind(run, ds_config, mesh, data)
