"""`generate` in every mode, and modified caches, against the model without a cache."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CompileConfig, DynamicCache, PreTrainedConfig, StaticCache

from megatron_bipe.config import RopeScaling
from megatron_bipe.hf.positions_bipe import PositionIds, read_cache_positions, write_cache_positions
from tests.helpers.hf import NEAR

# No loops and frequent separators, so that generated tokens change the positions.
LIVELY = {"no_repeat_ngram_size": 2, "sequence_bias": {(3,): 4.0, (5,): 4.0}, "max_new_tokens": 24}


def padded_prompt(tokens_of, rows, side):
    """Return prompts [rows, 16] with padding on one side, and their mask."""
    prompt, mask = tokens_of(rows, 16, seed=3), torch.ones(rows, 16, dtype=torch.long)
    if rows == 3:
        for row, width in ((0, 9), (2, 1)):
            mask[row, :width] = 0
        if side == "right":
            mask = mask.flip(1)
    return prompt, mask


def check_separators(generated):
    assert int(torch.isin(generated[:, 16:], torch.tensor([3, 5])).sum()) > 2


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("mode", "with_cache"),
    [
        ({}, {}),
        ({"do_sample": True, "temperature": 1.3}, {}),
        ({"num_beams": 3}, {}),
        ({"num_beams": 3, "do_sample": True, "num_return_sequences": 2}, {}),
        ({}, {"prefill_chunk_size": 7}),
        ({"num_beams": 2}, {"prefill_chunk_size": 1}),
    ],
    ids=["greedy", "sampling", "beams", "beam sampling", "chunks", "beams in chunks"],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_with_cache_equals_without(model, tokens_of, mode, with_cache, cache, side):
    prompt, mask = padded_prompt(tokens_of, 3, side)
    torch.manual_seed(0)
    cached = model.generate(prompt, attention_mask=mask, **LIVELY, **mode, **with_cache, **cache)
    torch.manual_seed(0)
    plain = model.generate(prompt, attention_mask=mask, use_cache=False, **LIVELY, **mode)
    assert torch.equal(cached, plain)
    assert cached.shape == (3 * mode.get("num_return_sequences", 1), 40)
    check_separators(cached)


@pytest.mark.parametrize("helper", ["lookup", "assistant"])
def test_generate_with_drafted_tokens_equals_greedy(model, tokens_of, helper, tiny, plan_of, hf_of):
    """Rejected drafts are removed from the cache."""
    drafts = {"prompt_lookup_num_tokens": 3}
    if helper == "assistant":
        config = tiny(num_layers=1)
        drafts = {"assistant_model": hf_of(plan_of(config, seed=1), config)}
    prompt, _ = padded_prompt(tokens_of, 1, "left")
    greedy = model.generate(prompt, use_cache=False, **LIVELY)
    assert torch.equal(model.generate(prompt, **LIVELY, **drafts), greedy)
    check_separators(greedy)


@pytest.mark.parametrize("mode", [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "high"}])
def test_generate_in_a_removed_mode_of_transformers_is_refused(bilevel, tokens_of, mode):
    with pytest.raises(ValueError, match="trust_remote_"):
        bilevel.generate(tokens_of(1, 8), max_new_tokens=2, **mode)


@pytest.mark.slow
def test_generate_compiled_over_a_static_cache_is_one_graph_and_equals_plain(model, tokens_of):
    prompt, mask = padded_prompt(tokens_of, 3, "left")
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # transformers compiles by itself on accelerators only
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    static = {"cache_implementation": "static", "compile_config": compile_config}
    compiled = model.generate(prompt, attention_mask=mask, **LIVELY, **static)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # of all decoding steps
    assert torch.equal(compiled, model.generate(prompt, attention_mask=mask, use_cache=False, **LIVELY))


@settings(max_examples=12)
@given(
    cuts=st.lists(st.integers(1, 39), max_size=6, unique=True),
    seed=st.integers(0, 99),
    padded=st.integers(0, 20),
    static=st.booleans(),
)
def test_forward_in_any_chunks_equals_one_pass(model, tokens_of, cuts, seed, padded, static):
    tokens, mask = tokens_of(2, 40, seed), torch.ones(2, 40, dtype=torch.long)
    mask[1, :padded] = 0
    cache, parts = StaticCache(config=model.config, max_cache_len=45) if static else DynamicCache(), []
    bounds = [0, *sorted(cuts), 40]
    with torch.no_grad():
        uncached = model(tokens, attention_mask=mask, use_cache=False).logits
        for start, stop in itertools.pairwise(bounds):
            chunk = tokens[:, start:stop]
            parts.append(model(chunk, attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True).logits)
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found[mask.bool()], uncached[mask.bool()], **NEAR)


def test_cropped_repeated_and_selected_cache_continues_correctly(model, tokens_of):
    """Assisted decoding, contrastive search and beam search modify a cache in these ways."""
    tokens, cache = tokens_of(2, 30), DynamicCache()
    with torch.no_grad():
        model(tokens[:, :24], past_key_values=cache)
        cache.crop(-6)
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([4, 0, 2]))
        cache.reorder_cache(torch.tensor([1, 0, 2]))
        rows = tokens[[0, 1, 0]]
        found = model(rows[:, 18:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(rows, use_cache=False).logits[:, 18:], **NEAR)


def test_static_cache_after_reset_starts_from_position_zero(model, tokens_of):
    tokens, cache = tokens_of(2, 20), StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        model(tokens_of(2, 17, seed=5), past_key_values=cache)
        cache.reset()
        found = torch.cat([model(part, past_key_values=cache).logits for part in tokens.split(7, dim=1)], dim=1)
        torch.testing.assert_close(found, model(tokens, use_cache=False).logits, **NEAR)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2**23), st.integers(0, 2**23)), min_size=1, max_size=9), st.booleans())
def test_cache_in_bf16_stores_positions_exactly(counts, static):
    next_intra, next_inter = torch.tensor(counts).T[:, None]
    position_ids = PositionIds(next_intra, next_inter, next_intra, next_inter)
    cache = DynamicCache()
    keys = torch.cat([torch.randn(1, 1, len(counts), 8), write_cache_positions(position_ids)], dim=-1).bfloat16()
    if static:
        shape = {"num_hidden_layers": 1, "num_attention_heads": 1}
        cache = StaticCache(config=PreTrainedConfig(**shape), max_cache_len=len(counts) + 2)
    cache.update(keys, keys[..., :8], 0)
    found = read_cache_positions(cache, 8, keys.device)
    assert torch.equal(found.next_intra[:, : len(counts)], next_intra)
    assert torch.equal(found.next_inter[:, : len(counts)], next_inter)
    assert found.num_cached == len(counts)
    assert [int(count) for count in found.last()] == list(counts[-1])


class OtherCache(DynamicCache):
    """Cache with layers of an unknown type."""

    def __init__(self):
        super().__init__()
        self.layers = [type("OtherLayer", (type(DynamicCache(config=PreTrainedConfig(**ONE)).layers[0]),), {})()]


ONE = {"num_hidden_layers": 1, "num_attention_heads": 1}


def test_forward_with_foreign_caches_refuses(bilevel, tokens_of):
    tokens, foreign = tokens_of(1, 5), DynamicCache()
    foreign.update(torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3, 8), 0)
    with pytest.raises(ValueError, match="past_key_values"):
        bilevel(tokens, past_key_values=foreign)
    early = StaticCache(config=bilevel.config, max_cache_len=20)
    early.early_initialization(1, 4, 8, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="past_key_values"):
        bilevel(tokens, past_key_values=early)
    with pytest.raises(ValueError, match="DynamicCache"):
        bilevel(tokens, past_key_values=OtherCache())


@pytest.mark.parametrize("width", [3, 6, 21])
def test_forward_over_static_cache_with_mask_of_another_width_refuses(bilevel, tokens_of, width):
    cache = StaticCache(config=bilevel.config, max_cache_len=20)
    bilevel(tokens_of(1, 4), past_key_values=cache)
    with pytest.raises(ValueError, match=rf"\[1, {width}\].*\[1, 5\]"):
        bilevel(tokens_of(1, 1), past_key_values=cache, attention_mask=torch.ones(1, width, dtype=torch.long))


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_cached_continuation_with_dynamic_scaling_beyond_training_refuses(
    implementation, tiny, plan_of, hf_of, tokens_of
):
    config = tiny(rope_scaling=RopeScaling(type="dynamic", factor=2.0))
    model, prompt = hf_of(plan_of(config), config), tokens_of(1, 28)
    cache = {"cache_implementation": implementation}
    with torch.no_grad(), pytest.raises(ValueError, match="use_cache=False"):
        model.generate(prompt, max_new_tokens=10, **cache)
    assert model.generate(prompt, max_new_tokens=10, use_cache=False).shape == (1, 38)
    within = [model.generate(prompt, max_new_tokens=4, **options) for options in (cache, {"use_cache": False})]
    assert torch.equal(*within)
