"""Partition of the layers into stages: every layer once, and the smallest possible cost of the largest stage."""

import itertools

import pytest

from megatron_bipe.config import ModelConfig
from megatron_bipe.config.load import load_run_config
from megatron_bipe.parallel.mesh import layer_costs, partition_layers


def worst(costs: list[int], bounds: list[int]) -> int:
    return max(sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 8])
def test_cut_stages_is_the_best_there_is(num_stages: int) -> None:
    model = ModelConfig(num_layers=6, hidden_size=64, num_heads=4, ffn_size=96, vocab_size=900)
    costs, found = layer_costs(model, 64), partition_layers(model, 64, num_stages)
    assert len(costs) == 8 and found[0] == 0 and found[-1] == 8 and len(found) == num_stages + 1
    assert all(start < stop for start, stop in itertools.pairwise(found))
    cuts = itertools.combinations(range(1, 8), num_stages - 1)
    assert worst(costs, found) == min(worst(costs, [0, *cut, 8]) for cut in cuts)


def test_cut_stages_gives_the_head_of_a_small_model_fewer_blocks() -> None:
    model = load_run_config(None).model  # 151M: the head costs as much as two and a half blocks
    costs = layer_costs(model, 1024)
    assert costs[-1] > 2 * costs[1]
    *_, before_last, end = partition_layers(model, 1024, 4)
    first_stop = partition_layers(model, 1024, 4)[1]
    assert end - before_last < first_stop
