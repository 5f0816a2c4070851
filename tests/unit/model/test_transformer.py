"""The complete model: layer order, names, sizes and operation count."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_bipe.config import ModelConfig
from megatron_bipe.model.loss import token_losses
from megatron_bipe.model.transformer import build_model, copy_source, count_parameters, make_plan, train_flops_per_token


def small_config(**changes):
    values = {
        "encoding": "bipe_rope",
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": 50,
        "num_layers": 3,
        "ffn_size": 48,
        "intra_size": 16,
        "train_len_tokens": 64,
    }
    return ModelConfig(**values | changes)


def random_ids(config, batch, num_tokens):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (batch, num_tokens), generator=generator)
    position_ids = torch.arange(num_tokens).expand(batch, -1)
    return tokens, position_ids % config.intra_size, position_ids // config.intra_size


def test_layers_are_embedding_blocks_head():
    plan = make_plan(small_config(), seed=0)
    assert [(layer.index, layer.kind) for layer in plan] == [
        (0, "Embedding"), (1, "Block"), (2, "Block"), (3, "Block"), (4, "Head"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("encoding", "published"), [("rope", 162_417_408), ("alibi", 162_417_408), ("bipe_rope", 163_203_840)]
)
def test_count_parameters_default_model_is_the_published_count(encoding, published):
    assert sum(count_parameters(ModelConfig(encoding=encoding))) == published


def test_count_parameters_equals_the_built_model_layer_by_layer():
    config = small_config()
    built = [sum(p.numel() for p in layer.parameters()) for layer in build_model(config)]
    assert count_parameters(config) == built


def test_tied_output_is_the_token_embedding_and_counts_once():
    config = small_config(tied_output=True)
    model = build_model(config, seed=1)
    assert model[-1].output.weight is model[0].token.weight
    names = [name for name, _ in model.named_parameters()]
    assert "0.token.weight" in names and not any("output" in name for name in names)
    assert sum(count_parameters(config)) == sum(p.numel() for p in model.parameters())


def test_tied_output_built_alone_equals_the_embedding_and_is_marked_as_replica():
    config = small_config(tied_output=True)
    plan = make_plan(config, seed=1)
    embedding, head = plan[0].build(), plan[-1].build()
    assert torch.equal(head.output.weight, embedding.token.weight)
    assert copy_source(head.output.weight) == "0.token.weight"
    assert copy_source(embedding.token.weight) is None


def test_count_parameters_allocates_no_weights():
    huge = small_config(hidden_size=65_536, ffn_size=1_000_000, vocab_size=1_000_000)  # 2.7 TB in fp32
    assert sum(count_parameters(huge)) > 6e11


def test_build_model_parameter_names_are_layer_index_and_name():
    names = {name for name, _ in build_model(small_config(num_layers=1)).named_parameters()}
    block = {"attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.gate_up", "mlp.down"}
    assert names == {f"1.{name}.weight" for name in block} | {
        "0.token.weight", "0.intra.weight", "2.norm.weight", "2.output.weight",
    }  # fmt: skip


def test_build_model_plain_encodings_ignore_both_segment_ids():
    config = small_config(encoding="rope")
    model, (tokens, intra, inter) = build_model(config), random_ids(config, 2, 40)
    assert "0.intra.weight" not in model.state_dict()
    assert torch.equal(model((tokens, intra, inter)), model((tokens, intra * 0, inter * 0)))


@pytest.mark.parametrize("encoding", ["bipe_rope", "bipe_alibi"])
def test_build_model_bilevel_encodings_see_both_segment_ids(encoding):
    config = small_config(encoding=encoding, init_std=0.2)
    model, (tokens, intra, inter) = build_model(config), random_ids(config, 2, 40)
    logits = model((tokens, intra, inter))
    assert logits.shape == (2, 40, 50)
    assert (logits - model((tokens, intra * 0, inter))).abs().max() > 0.1
    assert (logits - model((tokens, intra, inter * 0))).abs().max() > 0.1


def test_losses_mean_and_by_token_agree_with_log_softmax():
    logits = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))
    want = -logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(token_losses(logits, labels).double(), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(token_losses(logits, labels).mean().double(), want.mean(), atol=1e-6, rtol=0)
    assert token_losses(logits.bfloat16(), labels).dtype == torch.float32


def test_train_flops_equal_the_flop_counter_but_for_the_causal_half():
    config, batch, num_tokens = small_config(encoding="rope"), 2, 64
    tokens = random_ids(config, batch, num_tokens)
    model = build_model(config)
    # The counter ignores the CPU flash kernel; the math kernel counts as two batched products forward, four backward.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        token_losses(model(tokens), tokens[0]).mean().backward()
    counted = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attention_full = 6 * 2 * config.num_layers * config.num_heads * config.head_width * num_tokens

    assert counted["aten.bmm"] == attention_full * batch * num_tokens
    formula = train_flops_per_token(config, num_tokens) * batch * num_tokens
    assert formula == counted["aten.mm"] + counted["aten.bmm"] // 2
