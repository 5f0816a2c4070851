import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bipe.config import RopeScaling
from megatron_bipe.errors import CheckpointError
from megatron_bipe.hf.export import ExportOptions, export_model
from megatron_bipe.hf.load import load_exported
from megatron_bipe.hf.transformers_models import load_causal_lm
from megatron_bipe.hf.weight_mapping import to_llama
from tests.helpers.errors import assert_warned, raises


def export(plan, config, folder, fields, tokens, **options):
    position_ids = torch.arange(tokens.shape[1]).expand_as(tokens)
    sequences = (tokens, position_ids * 0, position_ids * 0)
    if config.bilevel:
        fields = fields._replace(segments_spec="fixed:4", token_ids=())
        sequences = (tokens, position_ids % 4, position_ids // 4)
    export_model(plan.state_dict(), config, folder, fields, sequences, None, ExportOptions(**options))


@pytest.fixture
def folder(tmp_path, tiny, plan_of, fields, tokens_of):
    config = tiny()
    export(plan_of(config), config, tmp_path / "model", fields, tokens_of(1, 16), dtype=torch.float32)
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {"encoding": "bipe_rope", "rope_scaling": RopeScaling(type="linear", factor=2.0), "rope_base": 5000.0},
        {"encoding": "bipe_alibi", "num_kv_heads": 2, "log_scale": True},
        {"encoding": "rope", "rope_scaling": RopeScaling(type="dynamic", factor=2.0), "num_kv_heads": 1},
        {"encoding": "alibi", "zero_last_row": True, "norm_eps": 1e-3},
    ],
)
def test_loaded_model_is_the_exported_one(tmp_path, changes, dtype, tiny, plan_of, fields, tokens_of):
    config, tokens = tiny(**changes), tokens_of(1, 16)
    plan = plan_of(config)
    export(plan, config, tmp_path / "m", fields, tokens, dtype=dtype, max_shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("model-0*.safetensors"))) > 1
    loaded = load_exported(tmp_path / "m")
    assert loaded.config == config.model_copy(update={"num_kv_heads": config.kv_heads})
    assert loaded.dtype == dtype
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], weight.to(dtype)) for name, weight in plan.state_dict().items())
    spec, ids = ("fixed:4", ()) if config.bilevel else (fields.segments_spec, fields.token_ids)
    known = {"tokenizer_fingerprint": "f" * 64, "special_in_text": None}
    assert loaded.data == known | {"segments_spec": spec, "token_ids": ids}
    if dtype == torch.float32:  # runs, with constants that were made on the right device
        ids = torch.zeros_like(tokens)
        torch.testing.assert_close(loaded.model((tokens, ids, ids)), plan((tokens, ids, ids)))


EXPORT = "tools/export_hf.py"
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}


def edit_config(folder, **changes):
    (folder / "SHA256SUMS").unlink(missing_ok=True)  # as the error for a changed file says
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (settings | changes).items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "observed", "remedy"),
    [
        ({"model_type": "gpt2"}, ("'gpt2'", "'bipe_rope'"), EXPORT),
        ({"model_type": "llama"}, ("'llama'", "'bipe_rope'"), EXPORT),
        ({"model_type": "llama", "encoding": ..., "rpe_type": "rope"}, ("'llama'", "'rope'"), "tools/import_hf.py"),
        ({"segments": None}, ("'bipe_rope'", "segment"), "segments"),
        ({"segments": {"spec": "reference"}}, ("{'spec': 'reference'}",), "token_ids"),
        ({"segments": {"spec": "reference", "token_ids": ["x"]}}, ("['x']",), "token_ids"),
        ({"hidden_size": ...}, ("'hidden_size'",), EXPORT),
        ({"hidden_size": -3}, ("hidden_size", -3), EXPORT),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4}}, ("'longrope'",), EXPORT),
        ({"rope_parameters": YARN}, ("'original_max_position_embeddings'",), EXPORT),
        ({"encoding": "bipe_ropes"}, ("'bipe_ropes'",), EXPORT),
        ({"rope_ntk": {"factor": 2.0}}, ("'rope_theta'",), EXPORT),
        ({"rope_parameters": [1]}, ("list",), EXPORT),
    ],
)
def test_load_of_wrong_config_refuses(folder, changes, observed, remedy):
    edit_config(folder, **changes)
    with raises(CheckpointError, *observed, location=folder / "config.json", remedy=remedy):
        load_exported(folder)


@pytest.mark.parametrize(
    ("changes", "observed"),
    [
        ({"intra_size": 13}, ("0.intra.weight", "[12, 32]", "[13, 32]")),
        ({"num_hidden_layers": 3}, ("model.layers.2.self_attn.q_proj.weight",)),
        ({"num_hidden_layers": 1}, ("9 weights",)),
        ({"num_key_value_heads": 2}, ("1.attention.qkv.weight", "[96, 32]")),
    ],
)
def test_load_of_config_that_the_weights_do_not_fit_refuses(folder, changes, observed):
    edit_config(folder, **changes)
    with raises(CheckpointError, *observed):
        load_exported(folder)


def test_load_without_config_refuses(tmp_path):
    with raises(CheckpointError, "config.json", location=tmp_path):
        load_exported(tmp_path)


def test_load_of_a_model_with_an_adapter_refuses(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')
    for load in (load_exported, lambda folder: load_causal_lm(folder, torch.float32)):
        with raises(CheckpointError, "adapter_config.json", location=folder, remedy="merge_and_unload"):
            load(folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_load_of_damaged_config_refuses(folder, content):
    (folder / "config.json").write_text(content)
    with raises(CheckpointError, "JSON", location=folder / "config.json", remedy=EXPORT):
        load_exported(folder)


def test_load_of_weights_with_a_flipped_bit_refuses(folder):
    weights = folder / "model.safetensors"
    intact = weights.read_bytes()
    for position in (0, len(intact) // 2, len(intact) - 1):
        weights.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
        with raises(CheckpointError, "SHA256SUMS", location=weights, remedy="SHA256SUMS"):
            load_exported(folder)
    (folder / "SHA256SUMS").unlink()  # as the message says; the last byte of a weight is all that differs
    load_exported(folder)


def test_load_goes_by_the_checksums_of_sha256sum(folder):
    listed = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    names = {path.name for path in folder.iterdir()} - {"SHA256SUMS", "README.md"}
    assert listed == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "SHA256SUMS").write_text(f"{listed['model.safetensors'].upper()} *model.safetensors\n")
    load_exported(folder)
    (folder / "SHA256SUMS").write_text("nothing\n")
    with raises(CheckpointError, "checksums", location=folder / "SHA256SUMS"):
        load_exported(folder)


def test_load_names_the_files_that_have_no_checksum(folder, caplog):
    load_exported(folder)
    assert not caplog.records
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if "safetensors" in line))  # earlier versions
    load_exported(folder)
    assert_warned(caplog, folder, "checksum of them: config.json")
    (folder / "SHA256SUMS").unlink()
    load_exported(folder)
    assert_warned(caplog, folder, "config.json, model.safetensors")


def test_load_of_a_changed_config_refuses(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10001.0'))
    with raises(CheckpointError, "SHA256SUMS", location=path, remedy="SHA256SUMS"):
        load_exported(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", "a/../../b", "..", "", "."])
def test_names_outside_the_folder_are_refused(folder, name):
    sums = folder / "SHA256SUMS"
    listed = sums.read_text()
    sums.write_text(f"{'0' * 64}  {name}\n")
    with raises(CheckpointError, name, location=sums):
        load_exported(folder)
    sums.write_text(listed)
    (folder / "model.safetensors").unlink()  # the index is read only without it
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with raises(CheckpointError, name, location=index):
        load_exported(folder)


def test_load_of_two_spellings_of_the_base_that_differ_refuses(folder):
    edit_config(folder, rope_theta=500000.0)
    with raises(CheckpointError, "10000.0", "500000.0", location=folder / "config.json"):
        load_exported(folder)
    edit_config(folder, rope_parameters=..., rope_scaling={"type": "linear", "factor": 2.0})
    config = load_exported(folder).config
    assert (config.rope_base, config.rope_scaling) == (500000.0, RopeScaling(type="linear", factor=2.0))


def test_load_of_damaged_weights_refuses(folder):
    weights = folder / "model.safetensors"
    intact = weights.read_bytes()
    (folder / "SHA256SUMS").unlink()
    for content in (b"", intact[:100], intact[:-5], b"\xff" * 50):
        weights.write_bytes(content)
        with raises(CheckpointError, "header", location=weights, remedy=EXPORT):
            load_exported(folder)
    weights.unlink()
    with raises(CheckpointError, "model.safetensors", location=folder, remedy=EXPORT):
        load_exported(folder)


def test_load_with_missing_shard_or_damaged_index_refuses(folder):
    (folder / "SHA256SUMS").unlink()
    weights = load_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "a.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "a.safetensors") | {"x": "b.safetensors"}}))
    with raises(CheckpointError, "b.safetensors", location=folder, remedy=EXPORT):
        load_exported(folder)
    index.write_text('{"weight_map": 3}')
    with raises(CheckpointError, location=index, remedy=EXPORT):
        load_exported(folder)


def test_load_of_weights_in_another_layout_refuses(folder, tiny, plan_of):
    weights = to_llama(plan_of(tiny(num_kv_heads=2)).state_dict(), tiny(num_kv_heads=2))
    (folder / "SHA256SUMS").unlink()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    with raises(CheckpointError, "[4, -1, 8]", 16, location=folder):
        load_exported(folder)
