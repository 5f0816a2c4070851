"""Coordinates of ranks in a layout."""

import itertools

import pytest
import torch

from megatron_bipe.config import ParallelConfig
from megatron_bipe.engine.base import make_topology
from megatron_bipe.parallel.mesh import Mesh


def mesh(rank: int, num_ranks: int, **parallel: int) -> Mesh:
    return Mesh(rank, rank, num_ranks, num_ranks, torch.device("cpu")).with_layout(ParallelConfig(**parallel))


@pytest.mark.parametrize(
    "parallel", [{}, {"tensor": 2}, {"pipeline": 2, "context": 2}, {"tensor": 2, "context": 2, "pipeline": 2}], ids=str
)
def test_mesh_counts_tensor_then_context_then_data_then_stages(parallel):
    meshes = [mesh(rank, 16, **parallel) for rank in range(16)]
    first = meshes[0]
    axes = first.pipeline, first.data_ranks, first.context, first.tensor
    assert first.data_ranks * first.context == first.replica_ranks
    coordinates = [(m.stage, m.data_rank, m.context_rank, m.tensor_rank) for m in meshes]
    assert coordinates == list(itertools.product(*map(range, axes)))
    assert [m.is_main for m in meshes] == [True] + [False] * 15


def test_mesh_has_the_order_of_deepspeeds_topology():
    for rank in range(16):
        here = mesh(rank, 16, tensor=2, context=2, pipeline=2)
        axes_of_rank = {"pipe": here.stage, "data": here.replica_rank, "model": here.tensor_rank}
        assert make_topology(here).get_rank(**axes_of_rank) == rank
