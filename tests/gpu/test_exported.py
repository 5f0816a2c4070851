"""An exported model on the device: the logits of the training model, and generation with a cache."""

import pytest
import torch

from megatron_bipe.config import ModelConfig
from megatron_bipe.data.segments import SegmentRule, bilevel_ids, segment_ends, sequence_ends
from megatron_bipe.hf.export import ExportOptions, export_model
from megatron_bipe.hf.hf_config import DataFields
from megatron_bipe.hf.transformers_models import load_causal_lm
from megatron_bipe.model import build_model

RULE = SegmentRule(spec="[3,5]", token_ids=(3, 5))
DATA = DataFields("[3,5]", RULE.token_ids, "f" * 64, {"bos": 1, "eos": 2})
TOLERANCE = 1e-4  # of a logit, relative to the largest one


@pytest.fixture(scope="module", params=["bipe_rope", "bipe_alibi"])
def models(request, device, tmp_path_factory):
    """Return the training model and the exported one on the device, and sequences with their ids."""
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_size": 96, "vocab_size": 64, "intra_size": 12}
    config = ModelConfig(encoding=request.param, train_len_tokens=32, init_std=0.2, **sizes)
    model = build_model(config, 0).eval()
    tokens = torch.randint(2, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    ends = sequence_ends(segment_ends(tokens.numpy(), RULE), RULE)
    sequences = (tokens, *map(torch.from_numpy, bilevel_ids(ends, config.intra_clip)))
    folder = tmp_path_factory.mktemp("export") / "m"
    export_model(model.state_dict(), config, folder, DATA, sequences, None, ExportOptions(dtype=torch.float32))
    exported = load_causal_lm(folder, torch.float32).to(device)
    exported.generation_config.eos_token_id = None  # generation continues to the requested length
    return model.to(device), exported, tuple(x.to(device) for x in sequences)


@torch.no_grad()
def test_exported_model_has_the_logits_of_the_training_model(models):
    model, exported, sequences = models
    found, expected = exported(sequences[0]).logits, model(sequences)
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE


def test_generation_with_a_cache_gives_the_tokens_without_one(models):
    _, exported, sequences = models
    prompt, length = sequences[0][:, :20], {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with_cache = exported.generate(prompt, pad_token_id=0, **length)
    assert torch.equal(with_cache, exported.generate(prompt, pad_token_id=0, use_cache=False, **length))
    assert with_cache.shape == (2, 32)
