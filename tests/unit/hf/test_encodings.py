"""Every encoding beyond the four published ones: export with parity, cached generation, and refused inputs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron_bipe.config import RopeScaling
from megatron_bipe.config.encodings import ABSOLUTE, ENCODINGS, RELATIVE
from megatron_bipe.hf.configuration_bipe import ABSOLUTE as REMOTE_ABSOLUTE
from megatron_bipe.hf.configuration_bipe import ENCODINGS as REMOTE_ENCODINGS
from megatron_bipe.hf.encodings_bipe import alibi
from megatron_bipe.hf.export import TOLERANCE, ExportOptions, export_model
from megatron_bipe.hf.hf_config import generation_settings, hf_settings
from megatron_bipe.hf.load import load_exported
from tests.helpers.hf import NEAR, ids_of

PLAIN = [name for name in ENCODINGS if not name.startswith("bipe_")]
GRID = [(f"bipe_{relative}", absolute) for relative in RELATIVE for absolute in ABSOLUTE]
ALL = [(name, "learned") for name in PLAIN] + GRID
YARN = RopeScaling(type="yarn", factor=4.0, beta_fast=8.0, original_positions=16)
SCALINGS = [RopeScaling(type="ntk", factor=4.0), YARN, RopeScaling(type="yarn", factor=2.0, attention_factor=1.3)]
DYNAMIC = RopeScaling(type="dynamic", factor=4.0)
LIVELY = {"no_repeat_ngram_size": 2, "sequence_bias": {(3,): 4.0, (5,): 4.0}, "max_new_tokens": 14}


def test_remote_code_knows_the_same_encodings():
    assert {name: tuple(parts) for name, parts in ENCODINGS.items()} == REMOTE_ENCODINGS
    assert tuple(ABSOLUTE) == REMOTE_ABSOLUTE


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 2, "log_scale": True}, {"num_heads": 2, "zero_last_row": True}]
)
@pytest.mark.parametrize(("encoding", "intra"), ALL)
def test_model_of_every_encoding_matches_the_training_model(encoding, intra, changes, tiny, plan_of, hf_of, tokens_of):
    config = tiny(encoding=encoding, intra_encoding=intra, **changes)
    plan = plan_of(config)
    for length in (1, 20, 32, 90):  # 90: beyond train_len_tokens
        if length <= (config.max_seq_len_tokens or length):
            tokens = tokens_of(2, length)
            with torch.no_grad():
                expected = plan((tokens, *ids_of(tokens, config)))
                torch.testing.assert_close(hf_of(plan, config)(tokens).logits, expected, **NEAR)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("encoding", ["rope", "bipe_rope", "xpos", "bipe_xpos", "randomized_rope"])
def test_model_with_scaled_rope_matches_the_training_model(encoding, scaling, tiny, plan_of, hf_of, tokens_of):
    config, tokens = tiny(encoding=encoding, rope_scaling=scaling), tokens_of(2, 60)
    plan = plan_of(config)
    with torch.no_grad():
        expected = plan((tokens, *ids_of(tokens, config)))
        torch.testing.assert_close(hf_of(plan, config)(tokens).logits, expected, **NEAR)
        unscaled = hf_of(plan, config.model_copy(update={"rope_scaling": None}))(tokens).logits
    assert (unscaled - expected).abs().max() > 0.01


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("encoding", "intra"), ALL)
def test_generate_with_cache_equals_without(encoding, intra, cache, tiny, plan_of, hf_of, tokens_of):
    config = tiny(encoding=encoding, intra_encoding=intra, num_kv_heads=2)
    model = hf_of(plan_of(config), config)
    prompt, mask = tokens_of(3, 16, seed=3), torch.ones(3, 16, dtype=torch.long)
    mask[0, :9] = mask[2, :1] = 0
    cached = model.generate(prompt, attention_mask=mask, cache_implementation=cache, prefill_chunk_size=7, **LIVELY)
    plain = model.generate(prompt, attention_mask=mask, use_cache=False, **LIVELY)
    assert torch.equal(cached, plain)
    with torch.no_grad():
        uncached = model(cached, use_cache=False).logits
        start = model(cached[:, :11])
        rest = model(cached[:, 11:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(torch.cat((start.logits, rest), dim=1), uncached, **NEAR)


@pytest.mark.parametrize(
    ("encoding", "intra"), [("t5", "learned"), ("learned", "learned"), ("bipe_xpos", "sinusoidal")]
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_model_on_padded_batch_gives_unpadded_results(encoding, intra, implementation, tiny, plan_of, hf_of, tokens_of):
    config = tiny(encoding=encoding, intra_encoding=intra, train_len_tokens=64)
    model = hf_of(plan_of(config), config)
    model.set_attn_implementation(implementation)
    tokens, mask = tokens_of(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    with torch.no_grad():
        found = model(tokens, attention_mask=mask).logits
        torch.testing.assert_close(found[1, 13:], model(tokens[1:, 13:]).logits[0], **NEAR)
        torch.testing.assert_close(found[:1], model(tokens[:1]).logits, **NEAR)
    model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_eager_attention_in_half_precision_is_finite_and_near(encoding, tiny, plan_of, hf_of):
    num_tokens = 1200  # as many segments: the steepest bias times sqrt(8) is 81,000, beyond fp16
    config = tiny(encoding=encoding, train_len_tokens=num_tokens, init_std=0.02)
    model = hf_of(plan_of(config), config)
    tokens = 3 + 2 * torch.randint(2, (1, num_tokens), generator=torch.Generator().manual_seed(0))  # separators
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits[:, 5:]
        model.set_attn_implementation("eager")
        with torch.autocast("cpu", torch.float16):
            found = [model(tokens, attention_mask=mask).logits[:, 5:]]
        for dtype in (torch.float16, torch.bfloat16):
            logits = model.to(dtype)(tokens, attention_mask=mask).logits
            assert logits.isfinite().all()
            found.append(logits[:, 5:])
    for logits, near in zip(found, (2e-3, 2e-3, 2e-2), strict=True):  # half of it is rounding to the dtype
        assert float((logits.float() - expected).abs().max() / expected.abs().max()) < near


def test_bias_does_not_overflow_where_keys_are_masked(tiny, plan_of, hf_of, tokens_of):
    config = tiny(encoding="t5")
    model, tokens, mask = hf_of(plan_of(config), config).half(), tokens_of(1, 8), torch.ones(1, 8, dtype=torch.long)
    mask[0, :3] = 0
    for layer in model.model.layers:
        layer.self_attn.relative_bias.weight.data.fill_(-40.0)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            assert model(tokens, attention_mask=mask).logits.isfinite().all()


EXPORTED = [
    {"encoding": "xpos"},
    {"encoding": "t5", "num_kv_heads": 2},
    {"encoding": "nope"},
    {"encoding": "learned", "train_len_tokens": 64},
    {"encoding": "sinusoidal"},
    {"encoding": "randomized_rope", "position_range": 50},
    {"encoding": "bipe_t5", "intra_encoding": "sinusoidal"},
    {"encoding": "bipe_rope", "intra_encoding": "none", "rope_scaling": YARN},
    {"encoding": "bipe_rope", "rope_scaling": SCALINGS[0]},
    {"encoding": "rope", "rope_scaling": SCALINGS[0]},
    {"encoding": "rope", "rope_scaling": YARN},
    {"encoding": "rope", "rope_scaling": SCALINGS[2]},
    {"encoding": "rope", "rope_scaling": DYNAMIC},
    {"encoding": "bipe_rope", "rope_scaling": DYNAMIC.model_copy(update={"original_positions": 20})},
    {"encoding": "bipe_nope", "intra_encoding": "sinusoidal", "intra_size": 4},
]


@pytest.mark.parametrize("changes", EXPORTED, ids=str)
def test_exported_model_loads_as_users_load_it_and_back(tmp_path, changes, tiny, plan_of, fields, tokens_of):
    config, tokens = tiny(**changes), tokens_of(2, 40)
    plan, sequences, folder = plan_of(config), (tokens, *ids_of(tokens, config)), tmp_path / "m"
    figure = export_model(
        plan.state_dict(), config, folder, fields, sequences, None, ExportOptions(dtype=torch.float32)
    )
    assert figure < TOLERANCE
    stock = config.encoding == "rope" and config.rope_scaling != DYNAMIC
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not stock)
    assert (type(model) is LlamaForCausalLM) == stock
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plan(sequences), **NEAR)
    if config.bilevel:
        assert all(torch.equal(*pair) for pair in zip(model.bilevel_ids(tokens), sequences[1:], strict=True))
    loaded = load_exported(folder)
    assert loaded.config == config.model_copy(update={"num_kv_heads": config.kv_heads})
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(sequences), plan(sequences))
    assert f"`{config.encoding}`" in (folder / "README.md").read_text("utf-8")


def test_stock_settings_of_yarn_are_those_of_transformers(tiny, fields):
    config = tiny(encoding="rope", rope_scaling=RopeScaling(type="yarn", factor=16.0))
    settings = hf_settings(config, fields, torch.float32)
    assert settings["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    assert settings["max_position_embeddings"] == 512


def test_learned_embedding_that_is_too_short_is_one_clear_error(tiny, plan_of, hf_of, tokens_of):
    config = tiny(encoding="learned")
    model = hf_of(plan_of(config), config)
    with pytest.raises(ValueError, match=r"33.*32"):
        model(tokens_of(1, 33))
    with pytest.raises(ValueError, match=r"33.*32"):
        model.generate(tokens_of(1, 30), max_new_tokens=5)
    mask = torch.ones(1, 33, dtype=torch.long)
    mask[0, 0] = 0  # padding has no position
    assert model(tokens_of(1, 33), attention_mask=mask).logits.shape == (1, 33, 64)


def test_learned_embedding_does_not_look_up_positions_of_padding(tiny, plan_of, hf_of, tokens_of):
    config = tiny(encoding="learned")
    model, tokens, mask = hf_of(plan_of(config), config), tokens_of(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, 32:] = mask[1, 31:] = 0
    with torch.no_grad():
        found = model(tokens, attention_mask=mask).logits
        torch.testing.assert_close(found[0, :32], model(tokens[:1, :32]).logits[0], **NEAR)
        torch.testing.assert_close(found[1, :31], model(tokens[1:, :31]).logits[0], **NEAR)


@pytest.mark.parametrize("encoding", ["xpos", "bipe_xpos"])
def test_xpos_has_an_end(encoding, tiny, plan_of, hf_of, tokens_of):
    config = tiny(encoding=encoding, num_layers=1, hidden_size=8, num_heads=1, ffn_size=8)
    model = hf_of(plan_of(config), config)
    with torch.no_grad():
        cached = model(tokens_of(1, 2**14)).past_key_values
        with pytest.raises(ValueError, match=r"16384.*16385"):
            model(tokens_of(1, 1), past_key_values=cached)


@pytest.mark.parametrize("encoding", ["alibi", "bipe_alibi"])
def test_alibi_has_an_end(encoding, tiny, plan_of, hf_of):
    model = hf_of(plan_of(tiny(encoding=encoding)), tiny(encoding=encoding))
    positions = torch.zeros(1, 2**16, dtype=torch.long)
    assert alibi(model.config, positions, None, None)["channels"][1].shape[2] == 2**16
    with pytest.raises(ValueError, match=r"65536.*65537"):
        alibi(model.config, torch.zeros(1, 2**16 + 1, dtype=torch.long), None, None)


def test_dynamic_scaling_of_a_row_goes_by_that_row_alone(tiny, plan_of, hf_of, tokens_of):
    config = tiny(encoding="rope", rope_scaling=DYNAMIC)
    plan = plan_of(config)
    model, tokens, mask = hf_of(plan, config), tokens_of(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[0, :60] = 0
    with torch.no_grad():
        found = model(tokens, attention_mask=mask, use_cache=False).logits  # longer row in the batch, then alone
        for row, start in ((0, 60), (1, 0)):
            alone = tokens[row : row + 1, start:]
            expected = plan((alone, *ids_of(alone, config)))
            torch.testing.assert_close(found[row, start:], expected[0], **NEAR)
            torch.testing.assert_close(model(alone, use_cache=False).logits, expected, **NEAR)


def test_spread_positions_have_an_end_and_no_cache_beyond_the_training_length(tiny, plan_of, hf_of, tokens_of, fields):
    config = tiny(encoding="randomized_rope", position_range=50)
    model = hf_of(plan_of(config), config)
    with pytest.raises(ValueError, match=r"51.*50"):
        model(tokens_of(1, 51))
    cached = model(tokens_of(1, 32)).past_key_values
    with pytest.raises(ValueError, match=r"33.*use_cache"):
        model(tokens_of(1, 1), past_key_values=cached)
    assert generation_settings(config, fields)["use_cache"] is False


def test_t5_with_a_fused_implementation_is_refused(tiny, plan_of, hf_of, tokens_of):
    config = tiny(encoding="t5")
    model = hf_of(plan_of(config), config)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'sdpa'"):
        model(tokens_of(1, 4))
