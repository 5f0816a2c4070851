"""Distribution of the model over ranks: the mesh, sharded layers, collectives, and the comparison of replicas."""

from megatron_bipe.parallel.collectives import all_gather_json, broadcast_json
from megatron_bipe.parallel.context_parallel import UlyssesExchange
from megatron_bipe.parallel.mesh import (
    Mesh,
    context_group,
    end_stages_group,
    layer_costs,
    partition_layers,
    tensor_group,
)
from megatron_bipe.parallel.replica_check import Replicas, check_replicas
from megatron_bipe.parallel.tensor_parallel import TensorParallelLayers, parameters_of_rank

__all__ = [
    "Mesh",
    "Replicas",
    "TensorParallelLayers",
    "UlyssesExchange",
    "all_gather_json",
    "broadcast_json",
    "check_replicas",
    "context_group",
    "end_stages_group",
    "layer_costs",
    "parameters_of_rank",
    "partition_layers",
    "tensor_group",
]
