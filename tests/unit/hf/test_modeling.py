import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_bipe.config import RopeScaling
from megatron_bipe.data.segments import SegmentRule, bilevel_ids, segment_ends, sequence_ends
from megatron_bipe.hf.authors_checkpoint import read_authors_checkpoint
from megatron_bipe.hf.configuration_bipe import BipeConfig
from megatron_bipe.hf.load import build_from_llama
from megatron_bipe.hf.modeling_bipe import BipeForCausalLM, _eager_attention
from megatron_bipe.hf.weight_mapping import to_llama
from megatron_bipe.model.loss import token_losses
from tests.helpers.hf import NEAR, PUBLISHED_ENCODINGS, ids_of

PUBLISHED = SegmentRule(spec="reference", token_ids=(13, 869))


def published(folder, hf_of, fields):
    found = read_authors_checkpoint(folder)
    plan = build_from_llama(to_llama(found.weights, found.config), found.config)
    return hf_of(plan, found.config, fields._replace(token_ids=PUBLISHED.token_ids))


@pytest.mark.parametrize("encoding", ["bipe_rope", "bipe_alibi"])
def test_model_on_golden_input_matches_reference(encoding, golden, hf_of, fields):
    model = published(golden / "models" / encoding, hf_of, fields)
    data = load_file(golden / "models" / encoding / "data.safetensors")
    for part in ("", "ext_"):
        tokens = data[part + "input_ids"]
        with torch.no_grad():
            found = model(tokens, labels=tokens)
        torch.testing.assert_close(found.logits[..., ::20], data[part + "logits_every_20th"], rtol=0, atol=5e-4)
        torch.testing.assert_close(found.logits.logsumexp(-1), data[part + "logsumexp"], rtol=0, atol=5e-4)
        assert torch.equal(found.logits.argmax(-1), data[part + "argmax"])
        torch.testing.assert_close(found.loss, data[part + "loss"][0], rtol=0, atol=2e-5)
        intra, inter = model.bilevel_ids(tokens)
        assert torch.equal(intra, data[part + "intra_ids"].clamp(max=127))
        assert torch.equal(inter, data[part + "inter_ids"])


@pytest.mark.parametrize("encoding", PUBLISHED_ENCODINGS)
def test_model_on_oracle_matches_logits_loss_and_gradients(encoding, oracle, hf_of, fields):
    folder = oracle / "models" / encoding
    model = published(folder, hf_of, fields)
    data, gradients = load_file(folder / "data.safetensors"), load_file(folder / "grads.safetensors")
    for part in ("", "ext_"):
        torch.testing.assert_close(model(data[part + "input_ids"]).logits, data[part + "logits"], rtol=0, atol=5e-4)
    found = model(data["input_ids"], labels=data["input_ids"])
    torch.testing.assert_close(found.loss, data["loss"][0], rtol=0, atol=2e-5)
    found.loss.backward()
    for name, parameter in model.named_parameters():
        expected = gradients[name.replace("embed_intra", "embeds.0")]
        assert float((parameter.grad - expected).norm() / expected.norm()) < 1e-4, name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "log_scale": True},
        {"rope_scaling": RopeScaling(type="linear", factor=3.0)},
        {"rope_scaling": RopeScaling(type="dynamic", factor=2.0), "log_scale": True},
        {"rope_scaling": RopeScaling(type="dynamic", factor=2.0, original_positions=16)},
        {"num_heads": 2, "rope_base": 500.0, "zero_last_row": True},
        {"num_heads": 1, "norm_eps": 1e-2},
    ],
)
@pytest.mark.parametrize("encoding", PUBLISHED_ENCODINGS)
def test_model_with_any_option_matches_the_training_model(encoding, changes, tiny, plan_of, hf_of, tokens_of):
    config = tiny(encoding=encoding, **changes)
    plan = plan_of(config)
    for length in (1, 20, 90):  # 90 is beyond train_len_tokens: dynamic scaling sets in
        tokens = tokens_of(2, length)
        with torch.no_grad():
            expected = plan((tokens, *ids_of(tokens, config)))
            torch.testing.assert_close(hf_of(plan, config)(tokens).logits, expected, **NEAR)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=30, max_size=30), min_size=1, max_size=3),
    st.sampled_from([None, 1, 2, 7, 40]),
)
def test_bilevel_ids_equal_those_of_the_data(rows, length):
    spec, token_ids = ("[3,5]", (3, 5)) if length is None else (f"fixed:{length}", ())
    shape = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 0, "vocab_size": 10, "intra_size": 6}
    config = BipeConfig(**shape, segments={"spec": spec, "token_ids": list(token_ids)})
    tokens = torch.tensor(rows)
    rule = SegmentRule(spec=spec, token_ids=token_ids)
    ends = np.broadcast_to(segment_ends(np.array(rows), rule), tokens.shape)
    expected = bilevel_ids(sequence_ends(ends, rule), 5)
    for found, wanted in zip(BipeForCausalLM(config).bilevel_ids(tokens), expected, strict=True):
        assert found.dtype == torch.int64
        np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_model_on_padded_batch_gives_unpadded_results(model, tokens_of, side):
    tokens, mask = tokens_of(3, 40), torch.ones(3, 40, dtype=torch.long)
    kept = {"left": slice(13, 40), "right": slice(0, 27), "both": slice(5, 33)}[side]
    mask[1] = 0
    mask[1, kept] = 1
    with torch.no_grad():
        found = model(tokens, attention_mask=mask).logits
        torch.testing.assert_close(found[1, kept], model(tokens[1:2, kept]).logits[0], **NEAR)
        torch.testing.assert_close(found[::2], model(tokens[::2]).logits, **NEAR)
    if hasattr(model.model, "embed_intra"):
        ids = model.bilevel_ids(tokens, mask)
        for padded, part in zip(ids, model.bilevel_ids(tokens[1:2, kept]), strict=True):
            assert torch.equal(padded[1, kept], part[0])


def test_model_on_padded_batch_trains_without_nan(model, tokens_of):
    tokens, mask = tokens_of(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :7] = 0
    model.zero_grad()
    model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.zero_grad()


def test_attention_on_plain_causal_path_is_never_materialised(model, tokens_of, monkeypatch):
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **kwargs):
        seen.append((attn_mask, is_causal))
        return plain(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model(tokens_of(2, 30))
    assert seen == [(None, True)] * 2


def test_eager_attention_equals_sdpa(model, tokens_of):
    tokens, mask = tokens_of(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        found = model(tokens, attention_mask=mask).logits
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **NEAR)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_eager_attention_masks_and_compares_scores_beyond_the_range_of_fp16(dtype):
    q = torch.full((1, 1, 2, 1), 300.0, dtype=dtype)
    mask = torch.zeros(1, 1, 2, 2, dtype=dtype)
    mask[..., 0, 1] = torch.finfo(dtype).min
    for keys in ([300, 298], [298, 300], [1, 300]):  # scores up to 90,000; in fp16 the mask is -65,504
        k = torch.tensor(keys, dtype=dtype).view(1, 1, 2, 1)
        mixed, weights = _eager_attention(None, q, k, k, mask, 1.0)
        assert torch.equal(weights[0, 0, 0], torch.tensor([1.0, 0.0], dtype=dtype))
        assert torch.equal(weights[0, 0, 1], (k == 300)[0, 0, :, 0].to(dtype))
        assert mixed[0, 1] == 300


@pytest.mark.parametrize("checkpointing", [False, True])
def test_eager_attention_returns_its_weights(model, tokens_of, checkpointing):
    tokens, mask = tokens_of(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    model.set_attn_implementation("eager")
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = model.train(checkpointing)(tokens, attention_mask=mask, output_attentions=True)
    model.config.output_attentions = True
    by_config = model(tokens, attention_mask=mask, return_dict=False)[-1]
    model.config.output_attentions = False
    assert model(tokens).attentions is None
    model.gradient_checkpointing_disable()
    model.eval().set_attn_implementation("sdpa")
    assert len(found.attentions) == len(by_config) == 2
    for weights, same in zip(found.attentions, by_config, strict=True):
        assert weights.shape == (2, 4, 20, 20) and torch.equal(weights, same)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 20))
        assert not weights.triu(1)[1].any() and not weights[0, :, 4:, :4].any()


def test_outputs_are_those_of_the_call_or_else_of_the_configuration(bilevel, tokens_of):
    tokens = tokens_of(1, 5)
    with pytest.raises(ValueError, match=r"'eager'.*'sdpa'"):
        bilevel(tokens, output_attentions=True)
    states = bilevel(tokens, output_hidden_states=True).hidden_states
    bilevel.config.output_hidden_states, bilevel.config.return_dict = True, False
    by_config = bilevel(tokens, use_cache=False)
    base = bilevel.model(tokens, use_cache=False)
    bilevel.config.output_hidden_states, bilevel.config.return_dict = False, True
    assert torch.equal(base[0], states[-1])
    for found in (by_config[1], base[1]):
        assert all(torch.equal(*pair) for pair in zip(found, states, strict=True))
    assert isinstance(bilevel.model(tokens, return_dict=False), tuple)


def test_labels_give_the_shifted_mean_loss(model, tokens_of):
    tokens = tokens_of(2, 20)
    found = model(tokens, labels=tokens)
    torch.testing.assert_close(found.loss, token_losses(found.logits[:, :-1], tokens[:, 1:]).mean())
    assert found.past_key_values is None
    ignored = model(tokens, labels=tokens.masked_fill(torch.arange(20) > 9, -100)).loss
    torch.testing.assert_close(ignored, token_losses(found.logits[:, :9], tokens[:, 1:10]).mean())


def test_logits_to_keep_gives_the_last_ones(bilevel, tokens_of):
    tokens = tokens_of(1, 10)
    torch.testing.assert_close(bilevel(tokens, logits_to_keep=2).logits, bilevel(tokens).logits[:, -2:])


def test_new_model_is_initialised_like_the_training_model(tiny, plan_of, hf_of, fields):
    config = tiny(hidden_size=64, vocab_size=500, intra_size=200, init_std=0.02, zero_last_row=True)
    settings_ = hf_of(plan_of(config), config).config
    torch.manual_seed(0)
    for name, parameter in BipeForCausalLM(settings_).named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        if "embed" in name:
            assert not parameter[-1].any(), name
        assert abs(float(parameter.detach().std()) / 0.02 - 1) < 0.05, name
        assert abs(float(parameter.detach().mean())) < 1e-3, name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"position_ids": torch.arange(4)[None]}, "position_ids"),
        ({"attention_mask": torch.ones(1, 3)}, r"\[1, 3\].*\[1, 4\]"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"\[1, 1, 4, 4\]"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 32)}, "^inputs_embeds"),
        ({"input_ids": None}, "inputs_embeds$"),
    ],
)
def test_forward_with_undetermined_positions_is_refused(bilevel, call, message):
    with pytest.raises(ValueError, match=message):
        bilevel(**({"input_ids": torch.tensor([[1, 3, 7, 8]])} | call))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": None}, "segment"),
        ({"encoding": "ropes"}, "'ropes'"),
        ({"intra_encoding": "rope"}, "intra_encoding"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4}}, "'longrope'"),
        ({"num_key_value_heads": 3}, "3 key/value"),
    ],
)
def test_model_of_impossible_config_refuses(changes, message):
    good = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    rule = {"segments": {"spec": "x", "token_ids": [1]}}
    with pytest.raises(ValueError, match=message):
        BipeForCausalLM(BipeConfig(**(good | rule | changes)))


def test_bilevel_ids_of_plain_encoding_refuses(tiny, plan_of, hf_of):
    config = tiny(encoding="alibi")
    with pytest.raises(ValueError, match="'alibi'"):
        hf_of(plan_of(config), config).bilevel_ids(torch.tensor([[1]]))
