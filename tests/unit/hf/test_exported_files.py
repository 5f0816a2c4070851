"""Tokenizer, model card and classification head of an exported folder."""

import json
import re

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from megatron_bipe.errors import CheckpointError
from megatron_bipe.hf.card import CardFacts
from megatron_bipe.hf.configuration_bipe import BipeConfig
from megatron_bipe.hf.hf_config import DataFields, hf_settings
from megatron_bipe.hf.load import load_exported
from megatron_bipe.hf.modeling_bipe import BipeForSequenceClassification
from tests.helpers.errors import raises
from tests.helpers.hf import (
    NEAR,
    WITHOUT_THE_PACKAGE,
    byte_level_folder,
    run_python,
    sentencepiece_folder,
    source_of,
)
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, text_file):
    """Return a tokenizer with special tokens of chats, one of which removes the spaces around it."""
    folder = byte_level_folder(tmp_path_factory.mktemp("chat") / "tokenizer", text_file)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<|user|>", tokenizers.AddedToken("<|end|>", lstrip=True, rstrip=True)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>", "eos_token": "<|end|>"}')
    return folder


CHAT = "<|user|>Hello<|end|> \n<|user|> again <|end|>"


@pytest.mark.parametrize("encoding", ["bipe_rope", "rope"])
@pytest.mark.parametrize("special_in_text", [True, False])
def test_exported_tokenizer_gives_training_ids_of_special_tokens_in_text(
    export, chat_folder, fields, encoding, special_in_text, tiny
):
    source, known = source_of(chat_folder, special_in_text), fields._replace(special_in_text=special_in_text)
    folder = export(tiny(encoding=encoding, vocab_size=520), data=known, tokenizer=source)
    loaded = AutoTokenizer.from_pretrained(folder)
    [trained] = source.encode([CHAT])
    user = loaded.convert_tokens_to_ids("<|user|>")
    assert (user in trained) == special_in_text
    assert loaded(CHAT, add_special_tokens=False).input_ids == trained.tolist()
    assert loaded(CHAT).input_ids == [source.special_ids["bos"], *trained.tolist()]
    assert load_exported(folder).data["special_in_text"] is special_in_text
    other = AutoTokenizer.from_pretrained(folder, split_special_tokens=special_in_text)
    assert (user in other(CHAT).input_ids) != special_in_text  # as the card says
    assert ("that token" in (folder / "README.md").read_text()) == special_in_text


def test_export_with_other_ids_of_special_tokens_in_text_than_training_refuses(export, chat_folder, tiny, tmp_path):
    source = source_of(chat_folder, special_in_text=True)._replace(special_in_text=False)
    with raises(CheckpointError, "<|", location=source.definition):
        export(tiny(vocab_size=520), "out/m", tokenizer=source)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("encoding", ["bipe_rope", pytest.param("rope", marks=pytest.mark.slow)])
def test_example_of_the_card_runs_without_a_question(export, chat_folder, encoding, tiny, tmp_path):
    source = source_of(chat_folder)
    folder = export(tiny(encoding=encoding, vocab_size=520), name='a "b"', tokenizer=source, card=CardFacts('a "b"'))
    [example] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = """
import builtins, os
os.chdir(os.path.dirname(folder))
builtins.input = lambda *_: os._exit(9)
"""
    without_code = """
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
print(">", len(tokenizer("Once upon a time").input_ids) == inputs.input_ids.shape[1], tokenizer.pad_token)
"""
    printed = run_python(WITHOUT_THE_PACKAGE + code + example + without_code, folder, tmp_path)
    assert printed == ["True", "<|end|>"]


@pytest.mark.parametrize(
    ("special_ids", "pad_id"),
    [({"unk": 0, "bos": 1, "eos": 2}, 0), ({"bos": 1, "eos": 2}, 2), ({"bos": 1, "eos": 2, "pad": 5}, 5), ({}, None)],
)
def test_padding_token_is_that_of_the_tokenizer_or_one_that_no_text_has(export, tiny, fields, special_ids, pad_id):
    folder = export(data=fields._replace(special_ids=special_ids))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text()).get("pad_token_id") == pad_id


@pytest.mark.parametrize("encoding", ["bipe_rope", "rope"])
def test_padded_batch_of_the_exported_tokenizer_gives_the_logits_of_each_text(
    export, text_file, tmp_path, encoding, tiny, fields
):
    source = source_of(sentencepiece_folder(tmp_path / "s", text_file))
    data = fields._replace(special_ids=source.special_ids)
    folder = export(tiny(encoding=encoding, vocab_size=520), data=data, tokenizer=source)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id == 0
    texts = ["The end.", "def f(x): return 10 * x"]
    for side in ("left", "right"):
        batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits
            for row, text in enumerate(texts):
                alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
                torch.testing.assert_close(logits[row][batch.attention_mask[row].bool()], alone, **NEAR)


@pytest.mark.parametrize("side", ["left", "right"])
def test_classification_head_pools_the_last_real_token_as_llama_does(export, tiny, plan_of, tokens_of, side):
    config, tokens = tiny(encoding="rope"), tokens_of(3, 20)
    llama = LlamaForSequenceClassification.from_pretrained(export(config, "llama"), num_labels=3, pad_token_id=0).eval()
    settings = hf_settings(config, DataFields("[3,5]", (3, 5), None, {"pad": 0}), torch.float32)
    settings["model_type"] = "bipe"
    own = BipeForSequenceClassification(BipeConfig(**settings, num_labels=3)).eval()
    own.load_state_dict(llama.state_dict())
    mask = torch.ones_like(tokens)
    mask[1, :7], mask[2, :1] = 0, 0
    tokens, mask = (tokens, mask) if side == "left" else (tokens.flip(1), mask.flip(1))
    batch = {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}
    with torch.no_grad():
        found, expected = own(**batch), llama(**batch)
    torch.testing.assert_close(found.logits, expected.logits, **NEAR)
    torch.testing.assert_close(found.loss, expected.loss, **NEAR)
    assert found.logits.shape == (3, 3)


def test_exported_folder_loads_as_a_classifier_and_travels_on(export, tmp_path):
    code = """
from transformers import AutoModelForSequenceClassification
load = AutoModelForSequenceClassification.from_pretrained
model = load(folder, trust_remote_code=True, num_labels=3).eval()
model.save_pretrained(folder + "-saved")
tokens = torch.tensor([[6, 3, 7]])
again = load(folder + "-saved", trust_remote_code=True).eval()
print(">", type(again).__name__, *model(tokens).logits.shape, torch.equal(model(tokens).logits, again(tokens).logits))
"""
    printed = run_python(WITHOUT_THE_PACKAGE + code, export(), tmp_path)
    assert printed == ["BipeForSequenceClassification", "1", "3", "True"]


@pytest.mark.parametrize("encoding", ["bipe_rope", pytest.param("rope", marks=pytest.mark.slow)])
def test_examples_of_the_documentation_run_and_learn(export, text_file, tiny, fields, tmp_path, monkeypatch, encoding):
    source = source_of(sentencepiece_folder(tmp_path / "s", text_file))
    data = fields._replace(special_ids=source.special_ids)
    export(tiny(encoding=encoding, vocab_size=520), "exported/quickstart", data=data, tokenizer=source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", None)  # nothing asks
    page = (ROOT / "docs" / "huggingface.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page.partition("## Fine-tuning with transformers")[2], re.DOTALL)
    assert len(blocks) == 3
    names = {}
    exec("\n".join(blocks), names)
    tokenizer = names["tokenizer"]
    prompt_ids, answer_ids = tokenizer(names["pairs"][0][0]).input_ids, names["encode"](*names["pairs"][0])["labels"]
    assert prompt_ids[0] == 1 and answer_ids[-1] == tokenizer.eos_token_id
    assert answer_ids[: len(prompt_ids)] == [-100] * len(prompt_ids)
    batch = names["DataCollatorForSeq2Seq"](tokenizer)([names["encode"](*pair) for pair in names["pairs"][:2]])
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "exported" / "quickstart", trust_remote_code=True)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned" / "model", trust_remote_code=True)
    with torch.no_grad():
        before, *after = (float(model(**batch).loss) for model in (stored, tuned, names["merged"]))
    assert max(after) < before - 0.3
    assert names["scores"].shape == (2, 2)
