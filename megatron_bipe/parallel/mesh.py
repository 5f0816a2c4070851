"""This process's coordinates in the parallel layout, its process groups, and the layers of each pipeline stage."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_bipe.config import ModelConfig, ParallelConfig


class Mesh(NamedTuple):
    """Coordinates of this process among all ranks of a launch.

    Ranks are laid out along four axes; tensor-parallel ranks are adjacent, since they communicate most: rank = ((stage
    x data-parallel ranks + data rank) x context-parallel ranks + context rank) x tensor-parallel ranks + tensor rank.
    """

    rank: int
    local_rank: int
    num_ranks: int
    num_local_ranks: int
    device: torch.device
    tensor: int = 1  # tensor-parallel ranks
    context: int = 1  # context-parallel ranks
    pipeline: int = 1  # stages
    sequence: bool = False  # sequence parallelism: tensor-parallel ranks shard the positions, too

    def with_layout(self, parallel: ParallelConfig) -> "Mesh":
        """Return the same process in the layout of `parallel`."""
        return self._replace(
            tensor=parallel.tensor,
            context=parallel.context,
            pipeline=parallel.pipeline,
            sequence=parallel.sequence,
        )

    @property
    def data_ranks(self) -> int:
        """Number of data-parallel replicas of the model."""
        return self.replica_ranks // self.context

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Index of the data-parallel replica that this rank is part of."""
        return self.replica_rank // self.context

    @property
    def context_rank(self) -> int:
        return self.replica_rank % self.context

    @property
    def replica_ranks(self) -> int:
        """Number of ranks with the same weights as this one: data-parallel x context-parallel ranks."""
        return self.num_ranks // (self.tensor * self.pipeline)

    @property
    def replica_rank(self) -> int:
        """Index among the ranks with the same weights."""
        return self.rank // self.tensor % self.replica_ranks

    @property
    def stage(self) -> int:
        return self.rank // (self.tensor * self.replica_ranks)

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs, metrics and pointers."""
        return self.rank == 0


def tensor_group(mesh: Mesh) -> dist.ProcessGroup:
    """Return this rank's tensor-parallel group; every rank of the launch must call this to create all of them."""
    starts = range(0, mesh.num_ranks, mesh.tensor)
    own = _own_group(mesh, [range(start, start + mesh.tensor) for start in starts])
    assert own is not None
    return own


def context_group(mesh: Mesh) -> dist.ProcessGroup:
    """Return this rank's context-parallel group; every rank of the launch must call this to create all of them."""
    block = mesh.tensor * mesh.context  # consecutive ranks with the same stage and data rank
    firsts = [start + index for start in range(0, mesh.num_ranks, block) for index in range(mesh.tensor)]
    own = _own_group(mesh, [range(first, first + block, mesh.tensor) for first in firsts])
    assert own is not None
    return own


def end_stages_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """Return the group of this rank and its counterpart on the other end stage, or None on middle stages.

    Every rank of the launch must call this to create all of them.
    """
    ranks_a_stage = mesh.num_ranks // mesh.pipeline
    return _own_group(mesh, [(rank, mesh.num_ranks - ranks_a_stage + rank) for rank in range(ranks_a_stage)])


def _own_group(mesh: Mesh, all_ranks: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """Create all groups and return the one that contains this rank."""
    own: dist.ProcessGroup | None = None
    for ranks in all_ranks:
        group = dist.new_group(list(ranks))
        own = group if mesh.rank in ranks else own
    return own


def layer_costs(model: ModelConfig, seq_len_tokens: int) -> list[int]:
    """Return the forward multiplications per token of each layer of the plan, which determine the time of its stage.

    Args:
        model: model configuration.
        seq_len_tokens: sequence length, half of which a token attends to on average.
    """
    heads_width = model.num_heads * model.head_width
    attention = model.hidden_size * (2 * model.num_heads + 2 * model.kv_heads) * model.head_width
    block = attention + heads_width * seq_len_tokens + 3 * model.hidden_size * model.ffn_size
    return [0, *[block] * model.num_layers, model.hidden_size * model.vocab_size]


def partition_layers(model: ModelConfig, seq_len_tokens: int, num_stages: int) -> list[int]:
    """Return the first layer of each stage and the end of the last, for the cut with the lowest maximal cost.

    Ties are resolved in favor of the most even costs. Every stage has at least one layer.
    """
    costs = layer_costs(model, seq_len_tokens)
    # best[n]: (maximal cost, sum of squared costs, cuts) of the first n layers in the stages so far
    best: list[tuple[int, int, list[int]] | None] = [(0, 0, [0]), *[None] * len(costs)]
    for _ in range(num_stages):
        following: list[tuple[int, int, list[int]] | None] = [None] * (len(costs) + 1)
        for stop in range(1, len(costs) + 1):
            for start in range(stop):
                if (before := best[start]) is not None:
                    cost = sum(costs[start:stop])
                    found = max(before[0], cost), before[1] + cost * cost, [*before[2], stop]
                    if following[stop] is None or found < following[stop]:  # type: ignore[operator]
                        following[stop] = found
        best = following
    chosen = best[-1]
    assert chosen is not None  # validated before: there are at least as many layers as stages
    return chosen[2]
