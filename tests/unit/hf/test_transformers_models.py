"""Commands run no code that a model folder or a task file brings or names, unless they are asked to."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bipe.errors import CheckpointError
from megatron_bipe.hf.export import export_model
from megatron_bipe.hf.modeling_bipe import BipeForCausalLM
from megatron_bipe.hf.transformers_models import load_auto_tokenizer, load_causal_lm
from tests.helpers.errors import raises
from tests.helpers.tools import assert_refuses

TRUST = "--trust-remote-code"


@pytest.fixture
def folder(tmp_path, tiny, plan_of, fields, tokens_of):
    """An exported stock LLaMA."""
    config, tokens = tiny(encoding="rope"), tokens_of(1, 16)
    sequences = (tokens, torch.zeros_like(tokens), torch.zeros_like(tokens))
    export_model(plan_of(config).state_dict(), config, tmp_path / "model", fields, sequences)
    return tmp_path / "model"


@pytest.fixture
def ran(tmp_path, folder):
    """A file that exists once code in the folder was run."""
    marker = tmp_path / "ran"
    lines = [
        f"open({str(marker)!r}, 'a').close()",
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast",
        "class Config(LlamaConfig): pass",
        "class Model(LlamaForCausalLM): config_class = Config",
        "class Tokenizer(PreTrainedTokenizerFast): pass",
    ]
    (folder / "evil.py").write_text("\n".join(lines) + "\n")
    return marker


def change(path, **changes):
    """Change a settings file, and its checksum, as whoever made the folder can."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | changes))
    sums = path.with_name("SHA256SUMS")
    others = [line for line in sums.read_text().splitlines() if not line.endswith(f"  {path.name}")]
    sums.write_text("\n".join([*others, f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"]) + "\n")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "someone/else--evil.Model"}}),
        ("config.json", {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}),
        ("config.json", {"attn_implementation": "someone/kernels"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        ("tokenizer_config.json", {"auto_map": ["evil.Tokenizer", None]}),
    ],
)
def test_folder_that_names_code_is_refused_before_it_runs(folder, ran, tmp_path, name, changes):
    change(folder / name, **changes)
    for load in (lambda: load_causal_lm(folder, torch.float32), lambda: load_auto_tokenizer(folder)):
        with raises(CheckpointError, name, str(next(iter(changes.values()))), location=folder / name, remedy=TRUST):
            load()
    command = ["--model", folder, "--prompt", "a"]
    assert_refuses("generate", command, CheckpointError, name, location=folder / name)
    assert not ran.exists()


def test_trusted_code_runs(folder, ran):
    change(folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert type(load_causal_lm(folder, torch.float32, trust_remote_code=True)).__name__ == "Model"
    assert ran.exists()


def test_bipe_folder_is_loaded_with_our_classes_whatever_it_brings(tmp_path, tiny, plan_of, fields, tokens_of):
    config, tokens = tiny(encoding="alibi"), tokens_of(1, 16)
    sequences = (tokens, torch.zeros_like(tokens), torch.zeros_like(tokens))
    export_model(plan_of(config).state_dict(), config, tmp_path / "m", fields, sequences)
    code = tmp_path / "m" / "modeling_bipe.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').close()\n" + code.read_text())
    with raises(CheckpointError, "SHA256SUMS", location=code):
        load_causal_lm(tmp_path / "m", torch.float32)
    (tmp_path / "m" / "SHA256SUMS").unlink()
    assert type(load_causal_lm(tmp_path / "m", torch.float32)) is BipeForCausalLM
    assert not (tmp_path / "ran").exists()
    load_causal_lm(tmp_path / "m", torch.float32, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_model_without_one_of_its_weights_is_refused(folder):
    (folder / "SHA256SUMS").unlink()
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]  # as in the folder of a classifier
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with raises(CheckpointError, "lm_head.weight", "LlamaForCausalLM", location=folder):
        load_causal_lm(folder, torch.float32)


def test_index_with_a_name_outside_the_folder_is_refused(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../m.safetensors"}}))
    with raises(CheckpointError, "../m.safetensors", location=folder / "model.safetensors.index.json"):
        load_causal_lm(folder, torch.float32)
