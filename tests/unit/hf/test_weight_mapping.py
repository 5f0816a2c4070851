import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bipe.config import ModelConfig
from megatron_bipe.config.encodings import ENCODINGS
from megatron_bipe.errors import CheckpointError
from megatron_bipe.hf.weight_mapping import from_llama, to_llama
from megatron_bipe.model.transformer import build_model
from tests.helpers.errors import raises


@settings(max_examples=30)
@given(
    encoding=st.sampled_from(list(ENCODINGS)),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (6, 3)]),
    layers=st.integers(1, 3),
    head_width=st.sampled_from([2, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_weights_to_llama_and_back_are_the_same_bits(encoding, heads, layers, head_width, dtype):
    num_heads, kv_heads = heads
    config = ModelConfig(
        encoding=encoding,
        num_layers=layers,
        hidden_size=num_heads * head_width,
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        ffn_size=6,
        vocab_size=11,
        intra_size=5,
    )
    weights = build_model(config).to(dtype).state_dict()
    there = to_llama(weights, config)
    assert there["model.layers.0.self_attn.k_proj.weight"].shape == (kv_heads * head_width, config.hidden_size)
    back = from_llama(there, config)
    assert list(back) and set(back) == set(weights)
    assert all(torch.equal(back[name], weight) and back[name].dtype == dtype for name, weight in weights.items())


def test_to_llama_puts_each_head_where_llama_expects_it(tiny):
    config = tiny(num_kv_heads=2, num_layers=1)  # 4 query heads, 8 wide; a group: 2 queries, key, value
    weights = build_model(config).state_dict()
    heads = weights["1.attention.qkv.weight"].unflatten(0, (8, 8))
    there = {part: to_llama(weights, config)[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"}
    assert torch.equal(there["q"].unflatten(0, (4, 8)), heads[[0, 1, 4, 5]])
    assert torch.equal(there["k"].unflatten(0, (2, 8)), heads[[2, 6]])
    assert torch.equal(there["v"].unflatten(0, (2, 8)), heads[[3, 7]])


@pytest.mark.parametrize(("way", "model_name"), [(to_llama, "1.mlp.down.weight"), (from_llama, "model.norm.weight")])
def test_weights_with_missing_or_unknown_name_are_refused(way, model_name, tiny):
    config = tiny()
    weights = build_model(config).state_dict()
    weights = weights if way is to_llama else to_llama(weights, config)
    with raises(CheckpointError, "extra.weight"):
        way(weights | {"extra.weight": torch.zeros(1)}, config)
    del weights[model_name]
    with raises(CheckpointError, model_name):
        way(weights, config)
