"""The model against outputs of the authors' code; a reduced set is committed, the full one is optional."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_bipe.config import ModelConfig
from megatron_bipe.hf.authors_checkpoint import read_authors_checkpoint
from megatron_bipe.hf.weight_mapping import from_llama, to_llama
from megatron_bipe.model.loss import token_losses
from megatron_bipe.model.positions.functional import BILEVEL_ALIBI_FACTOR, alibi_slopes
from megatron_bipe.model.transformer import build_model
from tests.helpers.paths import ORACLE

GOLDEN = Path(__file__).parents[2] / "golden"
ENCODINGS = ("bipe_rope", "bipe_alibi", "rope", "alibi")
needs_oracle = pytest.mark.skipif(not ORACLE.is_dir(), reason="the full oracle is not next to the repository")


def load_plan(folder):
    found = read_authors_checkpoint(folder)
    model = build_model(found.config)
    model.load_state_dict(found.weights)
    return model, found.config


def run(model, data, part):
    intra = data[part + "intra_ids"].clamp(max=127)  # the reference clips to 1023 for any embedding size
    return model((data[part + "input_ids"], intra, data[part + "inter_ids"]))


def check_loss(logits, data, part):
    loss = token_losses(logits[:, :-1], data[part + "input_ids"][:, 1:]).mean()
    torch.testing.assert_close(loss, data[part + "loss"][0], rtol=0, atol=2e-5)
    return loss


@pytest.mark.parametrize("encoding", ["bipe_rope", "bipe_alibi"])
def test_model_on_golden_input_matches_reference(encoding):
    folder = GOLDEN / "models" / encoding
    model, _ = load_plan(folder)
    data = load_file(folder / "data.safetensors")
    for part in ("", "ext_"):
        with torch.no_grad():
            logits = run(model, data, part)
        torch.testing.assert_close(logits[..., ::20], data[part + "logits_every_20th"], rtol=0, atol=5e-4)
        torch.testing.assert_close(logits.logsumexp(-1), data[part + "logsumexp"], rtol=0, atol=5e-4)
        assert torch.equal(logits.argmax(-1), data[part + "argmax"])
        check_loss(logits, data, part)


@needs_oracle
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_model_on_oracle_matches_logits_loss_and_gradients(encoding):
    folder = ORACLE / "models" / encoding
    model, config = load_plan(folder)
    data, expected = load_file(folder / "data.safetensors"), load_file(folder / "grads.safetensors")
    for part in ("", "ext_"):
        torch.testing.assert_close(run(model, data, part), data[part + "logits"], rtol=0, atol=5e-4)
    check_loss(run(model, data, ""), data, "").backward()
    gradients = to_llama({name: parameter.grad for name, parameter in model.named_parameters()}, config)
    for name, gradient in gradients.items():
        wanted = expected[name.replace("embed_intra", "embeds.0")]
        assert float((gradient - wanted).norm() / wanted.norm()) < 1e-4, name
        if "embed" in name:
            assert not gradient[-1].any(), name


@needs_oracle
def test_model_trained_on_oracle_batches_follows_the_trajectory():
    model, config = load_plan(ORACLE / "models" / "bipe_rope")
    data = load_file(ORACLE / "training" / "trajectory.safetensors")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    separators = torch.tensor([13, 869])

    def loss_on(tokens):
        ends = torch.isin(tokens, separators)
        inter = ends.cumsum(-1) - ends.long()
        position_ids = torch.arange(tokens.shape[1])
        opened = torch.where(ends, position_ids + 1, 0).cummax(-1).values.roll(1, -1)
        opened[:, 0] = 0
        logits = model((tokens, (position_ids - opened).clamp(max=config.intra_size - 1), inter))
        return token_losses(logits[:, :-1], tokens[:, 1:]).mean()

    for batch, expected in zip(data["batches"], data["losses"], strict=True):
        optimizer.zero_grad()
        loss = loss_on(batch)
        loss.backward()
        optimizer.step()
        assert abs(loss.item() - expected.item()) < 1e-4
    with torch.no_grad():
        after = torch.stack([loss_on(batch) for batch in data["batches"]])
    torch.testing.assert_close(after, data["losses_after_training"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_heads", [1, 2, 4, 8, 16])
def test_alibi_slopes_equal_the_reference(num_heads):
    golden = json.loads((GOLDEN / "alibi_slopes.json").read_text())[str(num_heads)]
    slopes = torch.tensor(alibi_slopes(num_heads))
    assert torch.equal(slopes, torch.tensor(golden["alibi"]))
    assert torch.equal(slopes * BILEVEL_ALIBI_FACTOR, torch.tensor(golden["bipe_alibi"]))


def test_alibi_slopes_of_other_head_counts_use_every_other_slope_of_the_next_power():
    eight, sixteen = alibi_slopes(8), alibi_slopes(16)
    assert alibi_slopes(12) == eight + sixteen[::2][:4]


@needs_oracle
def test_initial_weights_have_the_statistics_of_the_reference():
    golden = json.loads((ORACLE / "init_stats.json").read_text())["parameters"]
    shape = {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "ffn_size": 128, "vocab_size": 1000}
    config = ModelConfig(**shape, intra_size=128, train_len_tokens=128, zero_last_row=True)
    weights = to_llama(build_model(config).state_dict(), config)
    assert {name.replace("embed_intra", "embeds.0") for name in weights} == set(golden)
    for name, weight in weights.items():
        expected = golden[name.replace("embed_intra", "embeds.0")]
        assert list(weight.shape) == expected["shape"], name
        assert [int(row) for row in (weight == 0).all(-1).nonzero()] == expected["zero_rows"] or weight.ndim == 1, name
        assert bool((weight == 1).all()) == expected["all_ones"], name
        if not expected["all_ones"]:
            assert abs(float(weight.std()) - expected["std"]) < 1e-3, name
            assert abs(float(weight.mean()) - expected["mean"]) < 1.5e-3, name


def test_reference_names_survive_conversion_in_both_directions():
    found = read_authors_checkpoint(GOLDEN / "models" / "bipe_rope")
    back = from_llama(to_llama(found.weights, found.config), found.config)
    assert all(torch.equal(back[name], weight) for name, weight in found.weights.items())
