"""Libraries that users apply to a model: Trainer, PEFT, device maps, torch.compile, 8-bit weights."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from megatron_bipe.hf.checksums import check_folder
from megatron_bipe.hf.configuration_bipe import BipeConfig
from megatron_bipe.hf.export import REMOTE_CODE, ExportOptions, export_model, exported_logits
from megatron_bipe.hf.load import load_exported
from megatron_bipe.hf.modeling_bipe import BipeForCausalLM, BipeForSequenceClassification
from tests.helpers.hf import NEAR


@pytest.fixture
def fresh(tiny, plan_of, hf_of):
    """Return a model that a test may train."""
    config = tiny()
    return hf_of(plan_of(config), config)


@pytest.fixture
def folder(tmp_path, tiny, plan_of, hf_of, fields, tokens_of):
    """Return the same model as a folder, in small shards."""
    config, tokens = tiny(), tokens_of(1, 40)
    sequences = (tokens, *hf_of(plan_of(config), config).bilevel_ids(tokens))
    options = ExportOptions(dtype=torch.float32, max_shard_bytes=20_000)
    export_model(plan_of(config).state_dict(), config, tmp_path / "model", fields, sequences, None, options)
    return tmp_path / "model"


def test_gradient_checkpointing_gives_the_same_gradients(fresh, tokens_of):
    tokens, gradients = tokens_of(2, 20), []
    fresh.train()
    for switch in (fresh.gradient_checkpointing_disable, fresh.gradient_checkpointing_enable):
        switch()
        fresh.zero_grad()
        fresh(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in fresh.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_trainer_learns_with_checkpointing_as_without_and_saves(fresh, tiny, plan_of, hf_of, tokens_of, tmp_path):
    config, rows = tiny(), tokens_of(4, 20)
    examples = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
    losses = []
    for checkpointing, model in ((False, fresh), (True, hf_of(plan_of(config), config))):
        arguments = TrainingArguments(
            tmp_path / f"{checkpointing}",
            max_steps=8,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            gradient_checkpointing=checkpointing,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=examples)
        trainer.train()
        trainer.save_model()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.5
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "False")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("encoding", ["bipe_alibi", "t5"])
def test_saved_model_loads_elsewhere_with_its_own_code(encoding, tiny, plan_of, hf_of, tokens_of, tmp_path):
    config, tokens = tiny(encoding=encoding), tokens_of(2, 20)
    model = hf_of(plan_of(config), config)
    model.save_pretrained(tmp_path / "saved")
    for name, source in REMOTE_CODE.items():
        assert (tmp_path / "saved" / name).read_bytes() == source.read_bytes()
    torch.testing.assert_close(exported_logits(tmp_path / "saved", tokens), model(tokens).logits, **NEAR)
    assert {*REMOTE_CODE, "model.safetensors"} == {
        line.split()[1] for line in (tmp_path / "saved" / "SHA256SUMS").read_text().splitlines()
    }
    check_folder(tmp_path / "saved")
    assert load_exported(tmp_path / "saved").config == config.model_copy(update={"num_kv_heads": 4})


def test_saved_classifier_has_its_entry_of_the_auto_map(tmp_path, fresh):
    settings = fresh.config.to_dict()
    del settings["auto_map"]
    BipeForSequenceClassification(BipeConfig(**settings)).save_pretrained(tmp_path / "saved")
    code = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert code["AutoModelForSequenceClassification"] == "modeling_bipe.BipeForSequenceClassification"


def test_model_saved_over_another_is_the_new_one(folder, fresh):
    fresh.lm_head.weight.data[0] += 1
    fresh.save_pretrained(folder)
    assert torch.equal(load_exported(folder).model.state_dict()["3.output.weight"], fresh.lm_head.weight)
    fresh.save_pretrained(folder, is_main_process=False)
    check_folder(folder)


def test_resized_vocabulary_trains_its_last_row_also_after_loading(tiny, plan_of, hf_of, tokens_of, tmp_path):
    config, tokens = tiny(zero_last_row=True), tokens_of(1, 20)
    model = hf_of(plan_of(config), config)
    model.resize_token_embeddings(64)
    assert model.config.zero_last_row  # as large as before
    model.resize_token_embeddings(66, mean_resizing=False)
    tokens[0, 3] = 65
    model.save_pretrained(tmp_path / "saved")
    for resized in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        logits = resized(tokens, labels=tokens)
        assert logits.logits.shape == (1, 20, 66)
        logits.loss.backward()
        assert resized.model.embed_tokens.weight.grad[65].any()
    assert load_exported(tmp_path / "saved").config.vocab_size == 66


def test_lora_trains_its_own_weights_alone_generates_and_merges(fresh, tokens_of, tmp_path):
    tokens = tokens_of(2, 20)
    before = {name: weight.clone() for name, weight in fresh.state_dict().items()}
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(fresh, lora)
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    assert len(trained) == 2 * 2 * 7  # two matrices for each of the seven of both layers
    model.eval()
    prompt = tokens[:, :8]
    shared = {"max_new_tokens": 16, "no_repeat_ngram_size": 2}
    cached = model.generate(input_ids=prompt, **shared)
    assert torch.equal(cached, model.generate(input_ids=prompt, use_cache=False, **shared))
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        adapted = model(input_ids=tokens).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, adapted, **NEAR)
        bare = BipeForCausalLM(fresh.config).eval()
        bare.load_state_dict(before)
        assert float((bare(tokens).logits - adapted).abs().max()) > 0.1
        again = PeftModel.from_pretrained(bare, tmp_path / "adapter").eval()
        torch.testing.assert_close(again(input_ids=tokens).logits, adapted, **NEAR)


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        {"": "disk"},
        {"model.embed_tokens": "cpu", "model.embed_intra": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        | {"model.norm": "cpu", "lm_head": "cpu"},
    ],
    ids=["auto", "disk", "mixed"],
)
def test_model_spread_by_a_device_map_generates_the_same(folder, device_map, fresh, tokens_of):
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    found, expected = (m.generate(tokens_of(2, 9), max_new_tokens=9, eos_token_id=None) for m in (model, fresh))
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_compiled_model_gives_the_same_logits_without_a_graph_break(model, tokens_of):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for length in (20, 33):
            tokens = tokens_of(2, length)
            found = compiled(tokens, use_cache=False).logits
            torch.testing.assert_close(found, model(tokens, use_cache=False).logits, **NEAR)


def test_model_in_8_bits_is_near(folder, fresh, tokens_of):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, which is 125 MB, is not installed")
    eight = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=eight, device_map="cpu")
    tokens = tokens_of(2, 40)
    with torch.no_grad():
        found, expected = model(tokens).logits.float(), fresh(tokens).logits
        # Measured: 0.09 of the largest logit; weights of another seed give 1.4.
        assert float((found - expected).abs().max() / expected.abs().max()) < 0.2
