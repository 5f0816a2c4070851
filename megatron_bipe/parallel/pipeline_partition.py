"""Partitioning of the plan of layers into pipeline stages."""

from megatron_bipe.config.schema import ModelConfig


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
