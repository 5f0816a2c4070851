"""A LLaMA that other programs made, as encoding `rope`: logits, refusals, evaluation, a run from it, export."""

import json
import shutil

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_bipe.checkpoint.find import find_checkpoint
from megatron_bipe.checkpoint.verify import read_weights
from megatron_bipe.errors import CheckpointError, DataError
from megatron_bipe.hf.load import load_exported
from tests.helpers.errors import assert_warned, raises
from tests.helpers.tools import assert_refuses, call_tool

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
YARN = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 2.0, "original_max_position_embeddings": 16}
REMEDY = "LlamaForCausalLM"


@pytest.fixture
def save(tmp_path):
    """Return a maker of a folder of transformers, with a model that is reproducible."""

    def make(dtype=torch.float32, shard="1GB", name="llama", **changes):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).to(dtype).eval()
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        return tmp_path / name, model

    return make


def edit(folder, **changes):
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, None),
        ({"num_key_value_heads": 2, "rms_norm_eps": 1e-3, "tie_word_embeddings": True}, None),
        ({"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e3, "factor": 4.0}}, "dynamic"),
        ({"rope_parameters": YARN}, "yarn"),
        ({"rope_parameters": YARN | {"beta_fast": 8.0, "attention_factor": 1.5}}, "yarn"),
    ],
    ids=str,
)
def test_stock_llama_has_the_logits_that_transformers_computes(save, changes, scaling):
    folder, model = save(**changes)
    tokens = torch.randint(0, 64, (2, 50), generator=torch.Generator().manual_seed(1))
    loaded = load_exported(folder)
    assert loaded.config.encoding == "rope" and loaded.data is None
    assert (loaded.config.rope_scaling and loaded.config.rope_scaling.type) == scaling
    with torch.no_grad():
        found = loaded.model((tokens, tokens * 0, tokens * 0))
        torch.testing.assert_close(found, model(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_settings_of_transformers_4_are_understood(save, scaling):
    folder, _ = save()
    edit(folder, rope_parameters=..., rope_theta=500000.0, rope_scaling=scaling, pretraining_tp=1, head_dim=...)
    config = load_exported(folder).config
    assert config.rope_base == 500000.0
    assert (config.rope_scaling and config.rope_scaling.type) == (scaling and next(iter(scaling.values())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_in_half_precision_without_checksums_are_read_and_said_to_be_unverified(save, dtype, caplog):
    folder, model = save(dtype, shard="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    loaded = load_exported(folder)
    assert loaded.dtype == dtype
    assert torch.equal(loaded.model.state_dict()["0.token.weight"], model.model.embed_tokens.weight)
    assert_warned(caplog, folder, "SHA256SUMS")


def test_buffers_and_the_copy_of_a_tied_output_are_not_weights(save):
    folder, _ = save(tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors")
    loaded = load_exported(folder)
    assert loaded.config.tied_output
    assert "3.output.weight" not in dict(loaded.model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "observed"),
    [
        ({"attention_bias": True}, ["attention_bias=True"]),
        ({"mlp_bias": True, "hidden_act": "gelu"}, ["mlp_bias=True", "hidden_act='gelu'"]),
        ({"head_dim": 16}, ["head_dim=16"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["'longrope'"]),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            ["'llama3'", "low_freq_factor"],
        ),
        ({"rope_parameters": YARN | {"truncate": False}}, ["'yarn'", "truncate"]),
        ({"rope_parameters": ..., "rope_scaling": {"type": "su", "factor": 2.0}}, ["'su'"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"num_hidden_layers": "two"}, ["num_hidden_layers"]),
        ({"hidden_size": -32, "head_dim": ...}, ["hidden_size"]),
        ({"num_attention_heads": 0}, ["zero"]),
    ],
    ids=str,
)
def test_llama_with_what_the_training_model_lacks_is_refused_by_name(save, changes, observed):
    folder, _ = save()
    edit(folder, **changes)
    with raises(CheckpointError, *observed, location=folder / "config.json", remedy=REMEDY):
        load_exported(folder)


def test_pickled_weights_are_refused_with_a_remedy_that_is_possible(save):
    folder, _ = save()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with raises(CheckpointError, "model.safetensors", location=folder, remedy="save_pretrained"):
        load_exported(folder)


@pytest.fixture
def complete(save, tmp_path):
    """Return a folder of a stock LLaMA with its tokenizer, and a dataset made with that."""
    folder, model = save(torch.bfloat16, num_key_value_heads=2)
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 60)}}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    texts = [" ".join(f"w{3 + (i * k) % 57}" for i in range(40)) for k in range(1, 9)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = ["--input", tmp_path / "raw.jsonl", "--tokenizer", folder, "--output", tmp_path / "data"]
    call_tool("preprocess", *made, "--segments", "fixed:8")
    return folder, model, tmp_path / "data"


def test_stock_llama_is_evaluated_continued_and_exported(complete, tmp_path):
    folder, model, data = complete
    evaluated = ["perplexity", "--model", folder, "--data", data, "--lengths", "16", "--output", tmp_path / "results"]
    call_tool("evaluate", *evaluated)
    assert (tmp_path / "results" / "perplexity.json").is_file()
    settings = ["encoding=rope", "num_layers=2", "hidden_size=32", "num_heads=4", "num_kv_heads=2", "ffn_size=48"]
    settings += ["vocab_size=64", "norm_eps=1e-6", "train_len_tokens=32"]
    more = [f"data.path={data}", "train.seq_len_tokens=16"]
    given = [f"--set={setting}" for setting in (*(f"model.{setting}" for setting in settings), *more)]
    call_tool("import_hf", "--input", folder, "--checkpoint", tmp_path / "run", *given)
    weights = read_weights(find_checkpoint(tmp_path / "run"))
    assert torch.equal(weights["0.token.weight"], model.model.embed_tokens.weight.float())
    call_tool("evaluate", *evaluated[:2], tmp_path / "run", *evaluated[3:], "--overwrite")
    call_tool("export_hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "out", "--dtype", "bf16")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_data_of_another_tokenizer_is_refused(complete, tmp_path):
    folder, _, data = complete
    other = shutil.copytree(folder, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w3"', '"x3"'))
    evaluated = ["perplexity", "--model", other, "--data", data, "--lengths", "16", "--output", tmp_path / "results"]
    assert_refuses("evaluate", evaluated, DataError, location=other)
