import dataclasses
import errno
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
)

from megatron_bipe.config import RopeScaling
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import CheckpointError
from megatron_bipe.hf import export as export_module
from megatron_bipe.hf.export import TOLERANCE, ExportOptions, export_model
from megatron_bipe.hf.load import load_exported
from megatron_bipe.hf.tokenizer_files import HARD_TEXTS, check_tokenizer
from megatron_bipe.hf.weight_mapping import to_llama
from tests.helpers.errors import raises
from tests.helpers.hf import (
    PUBLISHED_ENCODINGS,
    WITHOUT_THE_PACKAGE,
    byte_level_folder,
    run_python,
    sentencepiece_folder,
    source_of,
)
from tests.helpers.paths import LLAMA


def left_behind(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("encoding", PUBLISHED_ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_model_loads_through_auto_classes_and_equals_the_training_model(
    tmp_path, encoding, dtype, tiny, plan_of, fields, sequences
):
    config = tiny(encoding=encoding, num_kv_heads=2)
    plan = plan_of(config)
    figure = export_model(
        plan.state_dict(), config, tmp_path / "m-1.0", fields, sequences, None, ExportOptions(dtype=dtype)
    )
    assert figure < TOLERANCE
    assert left_behind(tmp_path) == ["m-1.0"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m-1.0", trust_remote_code=encoding != "rope")
    assert model.dtype == dtype
    for name, weight in to_llama(plan.state_dict(), config).items():
        assert torch.equal(model.state_dict()[name], weight.to(dtype))
    if dtype == torch.float32:
        with torch.no_grad():
            found, expected = model(sequences[0]).logits, plan(sequences)
        assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE
    if encoding.startswith("bipe"):
        assert all(torch.equal(*pair) for pair in zip(model.bilevel_ids(sequences[0]), sequences[1:], strict=True))


@pytest.mark.parametrize("encoding", ["bipe_alibi", "rope"])
def test_exported_model_with_tied_output_has_one_embedding_and_equals_the_training_model(
    export, encoding, tiny, plan_of, sequences
):
    config = tiny(encoding=encoding, tied_output=True)
    plan = plan_of(config)
    folder = export(config, weights=dict(plan.named_parameters()))  # as in a checkpoint: the embedding once
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=encoding != "rope")
    with torch.no_grad():
        found, expected = model(sequences[0]).logits, plan(sequences)
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE
    loaded = load_exported(folder)
    assert loaded.config.tied_output
    with torch.no_grad():
        assert torch.equal(loaded.model(sequences), expected)


def test_export_of_rope_is_a_stock_llama(export, tiny):
    folder = export(tiny(encoding="rope", rope_scaling=RopeScaling(type="linear", factor=2.0), num_kv_heads=2))
    settings = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in settings
    assert not list(folder.glob("*.py"))
    assert settings["segments"] == {"spec": "[3,5]", "token_ids": [3, 5]}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    assert model.generation_config.use_cache is not False


@pytest.mark.parametrize(
    "changes", [{"log_scale": True}, {"rope_scaling": RopeScaling(type="dynamic", factor=2.0)}], ids=str
)
def test_export_of_rope_as_llama_does_not_have_it_is_remote_code(export, tiny, changes):
    folder = export(tiny(encoding="rope", **changes))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bipe"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation.get("use_cache", True) == ("log_scale" in changes)  # else cached keys would go stale


def test_export_writes_everything_a_user_needs(export, tiny, plan_of):
    folder = export(max_shard_bytes=20_000)
    files = left_behind(folder)
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors.index.json"} <= set(files)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    names = [name for shard in shards for name in load_file(shard)]
    assert sorted(names) == sorted(to_llama(plan_of(tiny()).state_dict(), tiny()))
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (1, 2)
    assert settings["tokenizer_fingerprint"] == "f" * 64
    card = (folder / "README.md").read_text()
    for needed in (
        "# Tiny",
        "| train.steps | 3 |",
        "a\\|b",
        "`[3,5]`, separator ids 3, 5",
        "of the largest logit",
        "f" * 64,
    ):
        assert needed in card
    assert "trust_remote_code=True" in card


def test_remote_code_runs_where_this_package_is_not_installed_and_travels_on(export, tmp_path):
    code = """
model = load(folder, trust_remote_code=True)
model.save_pretrained(folder + "-saved")
for each in (model, load(folder + "-saved", trust_remote_code=True)):
    assert sys.modules[type(each).__module__].__file__.startswith(cache)
    torch.manual_seed(0)
    print(">", *each.generate(torch.tensor([[6, 3, 7]]), max_new_tokens=3, eos_token_id=None)[0].tolist())
"""
    printed = run_python(WITHOUT_THE_PACKAGE + code, export(), tmp_path)
    assert printed[:3] == ["6", "3", "7"] and len(printed) == 12
    assert printed[:6] == printed[6:]


def test_two_versions_of_remote_code_under_one_name_do_not_mix(export, tmp_path, monkeypatch):
    export(name="a/m")
    changed = tmp_path / "modeling_bipe.py"
    changed.write_text(export_module.REMOTE_CODE[changed.name].read_text() + "\n\nBipeForCausalLM.version = 2\n")
    monkeypatch.setitem(export_module.REMOTE_CODE, changed.name, changed)
    export(name="b/m")
    code = """
for part in ("a", "b", "a"):
    print(">", getattr(load(f"{folder}/{part}/m", trust_remote_code=True), "version", 1))
"""
    assert run_python(WITHOUT_THE_PACKAGE + code, tmp_path, tmp_path) == ["1", "2", "1"]


def test_importing_the_package_registers_its_models(export, tmp_path):
    code = """
import megatron_bipe.hf
for trust in (None, True):
    for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
        print(">", type(auto.from_pretrained(folder, trust_remote_code=trust)).__module__)
"""
    package = "megatron_bipe.hf."
    expected = [package + name for name in ("configuration_bipe", "modeling_bipe", "modeling_bipe")]
    assert run_python(code, export(), tmp_path) == expected * 2


def test_export_with_wrong_segment_rule_leaves_nothing(export, fields, tmp_path):
    with raises(CheckpointError, f"{TOLERANCE:.0e}", location=tmp_path / "m") as error:
        export(data=fields._replace(token_ids=(3,)))
    assert re.search(r"\d\.\d\de[-+]\d\d", error.value.message)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    "mistake",
    [
        ("96.0", "95.0", "bipe_alibi"),
        ("closed_BT - ends_BT.long()", "closed_BT", "bipe_rope"),
        ("position_ids.inter if config.bilevel else position_ids.intra", "position_ids.inter", "alibi"),
    ],
)
def test_export_of_small_mistake_at_initial_weights_is_caught(export, tmp_path, monkeypatch, mistake, tiny):
    """At std 0.02 attention is nearly flat: the limit must be tight enough even then."""
    right, wrong, encoding = mistake
    for name, source in export_module.REMOTE_CODE.items():
        text = source.read_text()
        if right in text:
            (tmp_path / name).write_text(text.replace(right, wrong))
            monkeypatch.setitem(export_module.REMOTE_CODE, name, tmp_path / name)
    assert list(tmp_path.glob("*_bipe.py"))
    with raises(CheckpointError, f"{TOLERANCE:.0e}", location=tmp_path / "out" / "m"):
        export(tiny(encoding=encoding, init_std=0.02), "out/m")
    assert left_behind(tmp_path / "out") == []


def test_export_over_something_else_refuses(export, tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    (target / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with raises(CheckpointError, location=target, remedy="another" if overwrite else "--overwrite"):
            export(overwrite=overwrite)
    assert left_behind(target) == ["thesis.tex"]
    (target / "thesis.tex").unlink()
    export(overwrite=True)
    before = (target / "config.json").stat().st_ino
    with raises(CheckpointError, location=target, remedy="--overwrite"):
        export()
    export(overwrite=True)
    assert (target / "config.json").stat().st_ino != before
    assert left_behind(tmp_path) == ["m"]
    for name in ("notes.md", "model.bin", ".git", "model.safetensors.old"):
        (target / name).mkdir()
        with raises(CheckpointError, name, location=target):
            export(overwrite=True)
        (target / name).rmdir()
    (tmp_path / "file").write_text("")
    with raises(CheckpointError, "File exists", location="file/m"):
        export(name="file/m")


def test_export_replaces_no_model_that_others_made(export, tmp_path):
    """Only the checksums that an export writes show that a folder is one, and which weights are its own."""
    export()
    target, sums = tmp_path / "m", (tmp_path / "m/SHA256SUMS").read_text()
    for listed in (None, sums.replace("model.safetensors", "model-00001-of-00002.safetensors")):
        (target / "SHA256SUMS").unlink() if listed is None else (target / "SHA256SUMS").write_text(listed)
        before = {path: path.stat().st_ino for path in target.iterdir()}
        with raises(CheckpointError, "model.safetensors" if listed else "SHA256SUMS", location=target):
            export(overwrite=True)
        assert {path: path.stat().st_ino for path in target.iterdir()} == before


@pytest.mark.parametrize("failing", [1, 2])
def test_export_that_cannot_replace_another_keeps_the_old_one(export, tmp_path, monkeypatch, failing):
    target, calls, rename = export(), [], Path.rename
    before = (target / "config.json").stat().st_ino

    def fails(self, to):
        calls.append(to)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    monkeypatch.setattr("megatron_bipe.io._exchange", lambda *_: False)  # as on file systems that cannot exchange names
    with pytest.raises(OSError, match="No space left"):
        export(overwrite=True)
    assert (target / "config.json").stat().st_ino == before
    assert left_behind(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("changes", "observed"),
    [
        ({"hidden_size": 40}, ("[64, 32]", "[64, 40]")),
        ({"ffn_size": 40}, ("[48, 32]", "[40, 32]")),
        ({"num_layers": 1}, ()),
    ],
)
def test_export_of_weights_of_another_model_refuses(export, tmp_path, changes, observed, tiny, plan_of):
    with raises(CheckpointError, *observed):
        export(tiny(**changes), weights=plan_of(tiny()).state_dict())
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("make", [sentencepiece_folder, byte_level_folder])
@pytest.mark.parametrize("encoding", ["bipe_rope", "rope"])  # remote code and stock choose tokenizers differently
def test_exported_tokenizer_gives_training_ids(export, tmp_path, make, encoding, text_file, tiny):
    folder = make(tmp_path / "tokenizer", text_file)
    exported = export(tiny(encoding=encoding, vocab_size=520), tokenizer=source_of(folder))
    loaded = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    trained = load_tokenizer(folder)
    for text, ids in zip(HARD_TEXTS, trained.encode_batch(HARD_TEXTS), strict=True):
        assert loaded(text).input_ids == [trained.bos_id, *ids.tolist()]
        assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == trained.decode(ids.tolist())
    assert loaded.padding_side == "left"
    assert set(loaded("a")) == {"input_ids", "attention_mask"}  # what `generate` of either class takes


def test_exported_llama_tokenizer_gives_training_ids(export, tiny):
    if not LLAMA.is_dir():
        pytest.skip(reason="the LLaMA tokenizer is not next to the repository")
    config = tiny(encoding="rope", vocab_size=32000, hidden_size=8, num_heads=1, num_layers=1)
    folder = export(config, tokenizer=source_of(LLAMA))
    check_tokenizer(folder, source_of(LLAMA))
    assert load_tokenizer(folder).fingerprint == load_tokenizer(LLAMA).fingerprint


def test_export_with_another_tokenizer_than_training_refuses(export, tmp_path, text_file, tiny):
    trained = source_of(sentencepiece_folder(tmp_path / "a", text_file))
    files = source_of(byte_level_folder(tmp_path / "b", text_file))
    with raises(CheckpointError, repr(HARD_TEXTS[1]), location=files.definition):
        export(tiny(vocab_size=520), "out/m", tokenizer=files._replace(encode=trained.encode))
    assert left_behind(tmp_path / "out") == []


def test_export_with_tokenizer_larger_than_the_embedding_is_refused(export, tmp_path, text_file):
    source = source_of(byte_level_folder(tmp_path / "b", text_file))
    with raises(CheckpointError, 399, 64, location=source.definition):
        export(tokenizer=source)


def test_exported_config_reads_back_unchanged(export, tmp_path, tiny):
    folder = export(tiny(rope_scaling=RopeScaling(type="linear", factor=2.5), rope_base=777.0))
    loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    for key, value in json.loads((folder / "config.json").read_text()).items():
        if key not in ("auto_map", "architectures", "dtype") and value is not None:
            assert again[key] == value, key
    assert dataclasses.asdict(loaded)["rope_parameters"] == {"rope_type": "linear", "factor": 2.5, "rope_theta": 777.0}
