"""Initial weights: their dependence on the seed, and their distribution."""

import pytest
import torch

from megatron_bipe.config import ModelConfig
from megatron_bipe.model.transformer import build_model, init_layer, layer_seed, make_plan


def small_config(**changes):
    values = {
        "encoding": "bipe_rope",
        "hidden_size": 64,
        "num_heads": 4,
        "vocab_size": 500,
        "num_layers": 2,
        "ffn_size": 96,
        "intra_size": 40,
        "train_len_tokens": 64,
    }
    return ModelConfig(**values | changes)


def layer_weights(model, index):
    return list(model[index].state_dict().values())


def all_equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_init_deeper_model_has_the_same_first_layers(index):
    shallow, deep = build_model(small_config(), seed=5), build_model(small_config(num_layers=6), seed=5)
    assert all_equal(layer_weights(shallow, index), layer_weights(deep, index))


def test_init_single_layer_equals_the_same_layer_of_the_full_model():
    full = build_model(small_config(), seed=5)
    alone = make_plan(small_config(), seed=5)[2].build()
    assert all_equal(alone.state_dict().values(), layer_weights(full, 2))


def test_init_global_generator_does_not_matter():
    torch.manual_seed(3)
    first = build_model(small_config(), seed=1)
    torch.manual_seed(4)
    assert all_equal(first.state_dict().values(), build_model(small_config(), seed=1).state_dict().values())


def test_init_seed_and_layer_both_change_the_weights():
    model, other = build_model(small_config(), seed=5), build_model(small_config(), seed=6)
    ours, neighbour, reseeded = (m.attention.qkv.weight for m in (model[1], model[2], other[1]))
    assert not torch.equal(ours, neighbour)
    assert not torch.equal(ours, reseeded)


def test_layer_seed_is_a_63_bit_number_without_collisions_between_runs_and_layers():
    seeds = [layer_seed(seed, index) for seed in range(50) for index in range(50)]
    assert len(set(seeds)) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_init_matrices_are_normal_and_norms_are_one():
    model = build_model(small_config(init_std=0.05), seed=0)
    matrices = 0
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        matrices += 1
        spread = 0.05 / weight.numel() ** 0.5  # of the mean; that of the standard deviation is smaller
        assert abs(weight.mean().item()) < 5 * spread, name
        assert abs(weight.std().item() - 0.05) < 5 * spread, name
    assert matrices == 3 + 2 * 4


@pytest.mark.parametrize("zero_last_row", [False, True])
def test_init_last_embedding_rows_are_zero_and_untrained_only_on_request(zero_last_row):
    config = small_config(zero_last_row=zero_last_row)
    model = build_model(config)
    tokens, intra = torch.full((1, 8), 499), torch.full((1, 8), 39)
    model((tokens, intra, torch.zeros_like(tokens))).sum().backward()
    for table in (model[0].token, model[0].intra):
        assert bool((table.weight[-1] == 0).all()) is zero_last_row
        assert bool((table.weight.grad[-1] == 0).all()) is zero_last_row


def test_init_meta_layer_draws_no_random_numbers(monkeypatch):
    with torch.device("meta"):
        layer = torch.nn.Linear(4, 4, bias=False)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: pytest.fail("numbers were drawn"))
    init_layer(layer, 0, small_config(), seed=0)
    assert layer.weight.is_meta
