"""Stock-LLaMA exports are read by transformers 4, and by programs that know its spelling of base and scaling."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_bipe.config import RopeScaling
from megatron_bipe.hf.export import ExportOptions, export_model
from megatron_bipe.hf.load import load_exported

# The last release of version 4, with the versions of its two requirements that it accepts.
VERSION_4 = ("transformers>=4.57,<4.58", "huggingface_hub>=0.34,<1", "tokenizers>=0.22,<0.23")
NO_INDEX = ("No matching distribution", "Could not find a version", "ConnectionError", "connection")
LENGTH = 96  # three times the training length, so that every scaling has an effect
SCALINGS = {
    "none": None,
    "linear": RopeScaling(type="linear", factor=4.0),
    "ntk": RopeScaling(type="ntk", factor=4.0),
    "yarn": RopeScaling(type="yarn", factor=4.0),
    "yarn-fields": RopeScaling(
        type="yarn", factor=4.0, original_positions=16, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5
    ),
}
PROGRAM = """
import json, sys
import torch, transformers
assert transformers.__version__.startswith("4.57."), transformers.__version__
found = {}
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        logits = model(torch.load(sys.argv[1])).logits
    found[folder] = {"type": type(model).__name__, "theta": model.config.rope_theta, "logits": logits.tolist()}
print(json.dumps(found))
"""


@pytest.fixture
def folders(tmp_path, tiny, plan_of, fields, tokens_of):
    """Exported models with a base of 500,000, by the name of their scaling."""
    made = {}
    for name, scaling in SCALINGS.items():
        config, tokens = tiny(encoding="rope", rope_base=500000.0, rope_scaling=scaling), tokens_of(1, 16)
        sequences = (tokens, torch.zeros_like(tokens), torch.zeros_like(tokens))
        made[name] = tmp_path / name
        options = ExportOptions(dtype=torch.float32)
        export_model(plan_of(config).state_dict(), config, made[name], fields, sequences, options=options)
    return made


def test_stock_llama_has_both_spellings_of_base_and_scaling(folders):
    for name, folder in folders.items():
        settings = json.loads((folder / "config.json").read_text())
        new, base = settings["rope_parameters"], settings["rope_theta"]
        assert base == new["rope_theta"] and (base == 500000.0) == (name != "ntk")
        scaled = {key: value for key, value in new.items() if key != "rope_theta"}
        assert settings["rope_scaling"] == (scaled if name not in ("none", "ntk") else None)
        assert AutoConfig.from_pretrained(folder).rope_parameters == new
        assert load_exported(folder).config.rope_scaling == SCALINGS[name]
        assert load_exported(folder).config.rope_base == 500000.0


@pytest.mark.slow
def test_transformers_4_computes_the_same_logits(folders, tmp_path, tokens_of):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), *VERSION_4]
    done = subprocess.run(install, capture_output=True, text=True, timeout=600)
    if done.returncode != 0 and any(words in done.stderr for words in NO_INDEX):
        pytest.skip(reason="the package index cannot be reached, or does not have transformers 4.57")
    assert done.returncode == 0, done.stderr[-2000:]
    tokens = tokens_of(1, LENGTH)
    torch.save(tokens, tmp_path / "tokens.pt")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "tokens.pt"), *map(str, folders.values())]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(site)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, folder in folders.items():
        assert found[str(folder)]["type"] == "LlamaForCausalLM"
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        difference = (torch.tensor(found[str(folder)]["logits"]) - expected).abs().max() / expected.abs().max()
        assert difference < 1e-5, name
