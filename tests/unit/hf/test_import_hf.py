import json
import os
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import models
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron_bipe.config import RopeScaling
from megatron_bipe.errors import CheckpointError, ConfigError, DataError
from megatron_bipe.hf.authors_checkpoint import PUBLISHED_SEPARATORS, read_authors_checkpoint
from megatron_bipe.hf.load import load_exported
from tests.helpers.errors import assert_warned, raises
from tests.helpers.tools import assert_refuses, call_tool


@pytest.fixture
def published(golden, tmp_path):
    """Return a copy of the golden BiPE-ALiBi model that a test may damage."""
    return Path(shutil.copytree(golden / "models" / "bipe_alibi", tmp_path / "published"))


def edit(folder, **changes):
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


@pytest.mark.parametrize("encoding", ["bipe_rope", "bipe_alibi"])
def test_imported_and_exported_weights_are_the_same_bits(encoding, golden, tmp_path):
    source = golden / "models" / encoding
    command = ["--input", source, "--output", tmp_path / "out"]
    call_tool("import_hf", *command)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("alibi"):
            assert torch.equal(found.pop(name.replace("embeds.0", "embed_intra")), weight)
    assert not found
    loaded = load_exported(tmp_path / "out")
    assert loaded.config == read_authors_checkpoint(source).config
    assert loaded.config.zero_last_row
    assert loaded.data == {
        "tokenizer_fingerprint": None,
        "special_in_text": None,
        "segments_spec": "reference",
        "token_ids": PUBLISHED_SEPARATORS,
    }
    data = load_file(source / "data.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        logits = model(data["ext_input_ids"]).logits
    torch.testing.assert_close(logits[..., ::20], data["ext_logits_every_20th"], rtol=0, atol=5e-4)
    assert_refuses("import_hf", command, CheckpointError, "--overwrite", location=tmp_path / "out")


def test_import_of_float16_keeps_the_bits(published, tmp_path):
    weights = {name: t.half() for name, t in load_file(published / "model.safetensors").items()}
    save_file(weights, published / "model.safetensors")
    edit(published, torch_dtype="float16")
    call_tool("import_hf", "--input", published, "--output", tmp_path / "out", "--segments", "[7,13]")
    loaded = load_exported(tmp_path / "out")
    assert loaded.dtype == torch.float16
    assert loaded.data["token_ids"] == (7, 13)
    assert torch.equal(loaded.model.state_dict()["0.token.weight"], weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_are_read(published, sharded):
    weights = load_file(published / "model.safetensors")
    expected = read_authors_checkpoint(published).weights
    (published / "model.safetensors").unlink()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    names = list(weights)
    files = {"a.bin": names[:9], "b.bin": names[9:]} if sharded else {"pytorch_model.bin": names}
    for file, part in files.items():
        torch.save({name: weights[name] for name in part}, published / file)
    if sharded:
        index = {"weight_map": {name: file for file, part in files.items() for name in part}}
        (published / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = read_authors_checkpoint(published).weights
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("harm",))


def test_pickle_with_code_is_not_run(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (published / "model.safetensors").unlink()
    torch.save({"x": Malicious()}, published / "pytorch_model.bin")
    with raises(CheckpointError, location="pytorch_model.bin"):
        read_authors_checkpoint(published)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("changes", "observed", "location"),
    [
        ({"rpe_type": ...}, ["rpe_type None"], "config.json"),
        ({"model_type": "bipe"}, ["'bipe'", "'bipe_alibi'"], "config.json"),
        ({"rpe_type": "xpos"}, ["rpe_type 'xpos'"], "config.json"),
        ({"rpe_type": "alibi"}, [1], ""),  # an unknown weight
        ({"num_attention_heads": 3}, [64], "config.json"),
        ({"rope_scaling": "linear"}, ["rope_scaling", "'linear'"], "config.json"),
        ({"rope_scaling": {"type": "yarn", "factor": 16.0}}, ["rope_scaling 'yarn'"], "config.json"),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'"], "config.json"),
        ({"tie_word_embeddings": True}, ["tied"], "config.json"),
        ({"rms_norm_eps": ...}, ["'rms_norm_eps'"], "config.json"),
        ({"num_hidden_layers": 4}, ["model.layers.3."], ""),
    ],
)
def test_read_of_impossible_model_refuses(published, changes, observed, location):
    edit(published, **changes)
    with raises(CheckpointError, *observed, location=location or None):
        read_authors_checkpoint(published)


@pytest.mark.parametrize("num_rows", [1025, 2048])
def test_import_cuts_the_rows_of_the_intra_table_that_the_authors_code_never_reads(
    published, tmp_path, num_rows, caplog
):
    weights = load_file(published / "model.safetensors")
    table = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(0))
    save_file(weights | {"model.embeds.0.weight": table}, published / "model.safetensors")
    edit(published, train_scale=num_rows)
    found = read_authors_checkpoint(published)
    assert_warned(caplog, 1024, num_rows - 1)
    assert torch.equal(found.weights["0.intra.weight"], table[:1024])
    assert (found.config.intra_size, found.config.intra_clip) == (1024, 1023)
    assert found.config.train_len_tokens == num_rows
    assert not found.config.zero_last_row  # row 1023 has learned, unlike the last one of their table
    call_tool("import_hf", "--input", published, "--output", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.embed_intra.weight"].shape == (1024, 64)


def test_import_of_dynamic_scaling_refers_to_max_position_embeddings(golden, tmp_path):
    folder = Path(shutil.copytree(golden / "models" / "bipe_rope", tmp_path / "published"))
    edit(folder, rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=64)
    config = read_authors_checkpoint(folder).config
    assert config.rope_scaling == RopeScaling(type="dynamic", factor=2.0, original_positions=64)
    assert config.train_len_tokens == 128
    call_tool("import_hf", "--input", folder, "--output", tmp_path / "out")
    assert load_exported(tmp_path / "out").config == config
    edit(folder, max_position_embeddings=...)
    assert read_authors_checkpoint(folder).config.rope_scaling.original_positions == 2048


def test_import_ignores_what_the_authors_code_ignores(published, golden, tmp_path, caplog):
    edit(published, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert read_authors_checkpoint(published).config.rope_scaling is None
    rotary = Path(shutil.copytree(golden / "models" / "bipe_rope", tmp_path / "rotary"))
    edit(rotary, rope_theta=500000.0, train_scale=...)
    config = read_authors_checkpoint(rotary).config
    assert (config.rope_base, config.train_len_tokens) == (10000.0, 256)
    assert_warned(caplog, "rope_theta", 500000.0)


def test_read_without_or_with_damaged_weights_refuses(published):
    (published / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with raises(CheckpointError, location="model.safetensors"):
        read_authors_checkpoint(published)
    (published / "model.safetensors").unlink()
    with raises(CheckpointError, "model.safetensors", "pytorch_model.bin", location=published):
        read_authors_checkpoint(published)
    (published / "pytorch_model.bin").write_bytes(b"nonsense")
    with raises(CheckpointError, location="pytorch_model.bin"):
        read_authors_checkpoint(published)
    for content in ("{", "[]", '{"weight_map": 3}'):
        (published / "pytorch_model.bin.index.json").write_text(content)
        with raises(CheckpointError, location="pytorch_model.bin.index.json"):
            read_authors_checkpoint(published)


def test_import_with_rule_that_needs_a_tokenizer_refuses(published, tmp_path):
    command = ["--input", published, "--output", tmp_path / "out", "--segments", "sentence"]
    assert_refuses("import_hf", command, DataError, "--tokenizer", location="--segments")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["bipe_rope", "bipe_alibi", "rope", "alibi"])
def test_import_of_each_published_kind_matches_in_both_precisions(encoding, oracle, tmp_path):
    source, data = oracle / "models" / encoding, load_file(oracle / "models" / encoding / "data.safetensors")
    half = Path(shutil.copytree(source, tmp_path / "half"))
    weights = {name: weight.half() for name, weight in load_file(source / "model.safetensors").items()}
    (half / "model.safetensors").unlink()
    torch.save(weights, half / "pytorch_model.bin")
    edit(half, torch_dtype="float16")
    for folder, dtype in ((source, torch.float32), (half, torch.float16)):
        output = tmp_path / str(dtype)
        call_tool("import_hf", "--input", folder, "--output", output)
        model = AutoModelForCausalLM.from_pretrained(output)
        assert model.dtype == dtype
        assert (type(model) is LlamaForCausalLM) == (encoding == "rope")
        if dtype == torch.float32:
            with torch.no_grad():
                for part in ("", "ext_"):
                    found = model(data[part + "input_ids"]).logits
                    torch.testing.assert_close(found, data[part + "logits"], rtol=0, atol=5e-4)
        else:  # its logits were compared by the export
            stored = {name.replace("embed_intra", "embeds.0"): weight for name, weight in model.state_dict().items()}
            assert all(torch.equal(weight, weights[name]) for name, weight in stored.items())


def test_import_with_tokenizer_that_cannot_resolve_the_rule_refuses(published, tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    command = ["--input", published, "--output", tmp_path / "out", "--tokenizer", folder]
    assert_refuses("import_hf", command, DataError, "fixed:N")
    assert not (tmp_path / "out").exists()


def test_import_options_that_mean_nothing_for_the_target_are_refused(published, tmp_path):
    given = ["--input", published, "--output", tmp_path / "out"]
    unused = ["--config", "no/such.yaml", "--set", "model.num_layers=99"]
    assert_refuses("import_hf", [*given, *unused], ConfigError, "--config, --set", "--output", location="--config")
    itself = published / ".." / "published"
    assert_refuses("import_hf", [*given[:3], itself, "--overwrite"], ConfigError, location=itself)
    assert read_authors_checkpoint(published).config.num_layers and not (tmp_path / "out").exists()
    call_tool("import_hf", *given)
    to_run = ["--input", tmp_path / "out", "--checkpoint", tmp_path / "run", "--segments", "newline"]
    assert_refuses("import_hf", to_run, ConfigError, "--segments", "--checkpoint", location="--segments")
