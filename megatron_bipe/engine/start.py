"""Which engine a layout needs."""

from typing import Any

from megatron_bipe.config.schema import RunConfig
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.engine.interface import Engine
from megatron_bipe.engine.pipeline_engine import PipelineEngine
from megatron_bipe.engine.zero_engine import ZeroEngine
from megatron_bipe.parallel.mesh import Mesh


def start_engine(run: RunConfig, ds_config: dict[str, Any], mesh: Mesh, data: DataRecord | None = None) -> Engine:
    """The engine of this rank; waits for all ranks.

    Args:
        run: the run configuration, validated.
        ds_config: result of `config.deepspeed.engine_config`.
        mesh: this process, laid out.
        data: what it will be trained on, for checkpoints to remember.
    """
    kind = PipelineEngine if mesh.pipeline > 1 else ZeroEngine
    return kind(run, ds_config, mesh, data)
