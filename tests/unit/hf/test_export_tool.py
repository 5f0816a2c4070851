import json

import pytest
import tokenizers
import torch
import yaml
from huggingface_hub import ModelCard
from tokenizers import models, pre_tokenizers
from transformers import AutoModelForCausalLM

from megatron_bipe.checkpoint.find import read_data_record
from megatron_bipe.config import DataConfig, RunConfig, TrainConfig
from megatron_bipe.data.manifest import BlendMember, DataRecord, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import CheckpointError, DataError
from megatron_bipe.eval.eval_model import load_eval_model, load_with_master_weights
from megatron_bipe.hf.load import load_exported
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.errors import raises
from tests.helpers.tools import assert_refuses, call_tool


@pytest.fixture
def run_dir(tmp_path, tiny, plan_of):
    """Return a run folder of pretrain.py whose training data has been removed."""
    folder = tmp_path / "run"
    (folder / "tokenizer").mkdir(parents=True)
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 60)}}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer = load_tokenizer(folder / "tokenizer")
    config = tiny(init_std=0.02)
    run = RunConfig(
        model=config,
        data=DataConfig(path=tmp_path / "gone"),
        train=TrainConfig(seq_len_tokens=32, precision="bf16", steps=7),
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    known = {"name": "w", "fingerprint": tokenizer.fingerprint, "vocab_size": 60, "special_ids": tokenizer.special_ids}
    record = DataRecord(
        tokenizer=TokenizerRecord(**known), rule=SegmentRule(spec="[3,5]", token_ids=(3, 5)), fingerprint="a" * 64
    )
    (folder / "data.json").write_text(record.model_dump_json())
    write_checkpoint(folder, 7, plan_of(config).state_dict())
    return folder


def test_export_tool_turns_a_run_into_a_model(run_dir, tmp_path):
    ended = call_tool("export_hf", "--checkpoint", f"{run_dir}@7", "--output", tmp_path / "out")
    assert f"{tmp_path / 'out'}: " in ended.output
    loaded = load_exported(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert loaded.data["segments_spec"] == "[3,5]"
    assert loaded.data["tokenizer_fingerprint"] == load_tokenizer(run_dir / "tokenizer").fingerprint
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a" * 64 in card and "| optimizer.weight_decay | 0.01 |" in card and "| Step | 7 |" in card
    assert "| Tokens seen in training | 57,344 |" in card  # 7 steps of 256 sequences of 32 tokens


def test_export_tool_puts_metrics_data_and_languages_into_the_card(run_dir, tmp_path):
    lines = [
        {"step": 6, "tokens": 5, "loss/train_nats": 9.0},
        {"step": 7, "tokens": 1234567, "loss/train_nats": 2.5},
        {"step": 7, "loss/valid_nats": 3.25},
        {"step": 8, "loss/train_nats": 1.0},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 7, "lo')
    record = read_data_record(run_dir)
    members = [BlendMember(path=f"data/{n}", fingerprint=n * 64, slots=s) for n, s in (("a", 7500), ("b", 2500))]
    (run_dir / "data.json").write_text(record.model_copy(update={"blend": tuple(members)}).model_dump_json())
    given = ("--language", "en", "de", "--datasets", "org/corpus")
    call_tool("export_hf", "--checkpoint", run_dir, "--output", tmp_path / "out", *given)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.language, card.data.datasets) == (["en", "de"], ["org/corpus"])
    for row in ("1,234,567", "2.5000 nats", "3.2500 nats", "75.00% `a`; 25.00% `b`", "@inproceedings", 'name = "out"'):
        assert row in card.text, row


def test_export_tool_stores_fp16_and_says_how_it_computes(run_dir, tmp_path):
    call_tool("export_hf", "--checkpoint", run_dir, "--output", tmp_path / "out", "--dtype", "fp16")
    assert load_exported(tmp_path / "out").dtype == torch.float16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16
    assert "| Computed in fp16 | logits differ" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "scale", "observed"),
    [("1.mlp.down.weight", 1e8, ("down_proj", 65504)), ("1.mlp.gate_up.weight", 5e3, ("fp16",))],
    ids=["a weight", "activations"],
)
def test_export_tool_refuses_a_model_beyond_the_range_of_fp16(run_dir, tmp_path, tiny, plan_of, name, scale, observed):
    weights = plan_of(tiny(init_std=0.02)).state_dict()
    write_checkpoint(run_dir, 8, weights | {name: weights[name] * scale})
    command = ["--checkpoint", run_dir, "--output", tmp_path / "out", "--dtype", "fp16"]
    assert_refuses("export_hf", command, CheckpointError, *observed, "--dtype bf16")
    assert not (tmp_path / "out").exists()


def evaluation(folder, source):
    folder.mkdir()
    results = [{"length_tokens": 1024, "perplexity": 20.5}, {"length_tokens": 8192, "perplexity": None}]
    data = {"name": "pg19", "fingerprint": "c" * 64}
    models = [{"source": "elsewhere@7", "results": []}, {"source": source, "results": results}]
    report = {"data": data, "protocol": "full", "dtype": "float32", "models": models}
    (folder / "perplexity.json").write_text(json.dumps(report))
    (folder / "perplexity.png").write_bytes(b"\x89PNG picture")
    return folder


def test_export_tool_puts_an_evaluation_into_the_card_if_it_is_of_this_checkpoint(run_dir, tmp_path):
    good = evaluation(tmp_path / "good", f"{run_dir}@7")
    call_tool("export_hf", "--checkpoint", run_dir, "--output", tmp_path / "out", "--evaluation", good)
    assert (tmp_path / "out" / "perplexity.png").read_bytes() == b"\x89PNG picture"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "![Perplexity by sequence length](perplexity.png)" in card and "c" * 64 in card
    assert "| sequence length | 1,024 | 8,192 |\n| --- | --- | --- |\n| perplexity | 20.50 | inf |" in card
    other = evaluation(tmp_path / "other", f"{run_dir}@6")
    command = ["--checkpoint", run_dir, "--output", tmp_path / "out2", "--evaluation"]
    assert_refuses("export_hf", [*command, other], CheckpointError, f"{run_dir}@6", f"{run_dir}@7", location=other)
    assert_refuses("export_hf", [*command, tmp_path], CheckpointError, "perplexity.json", location=tmp_path)
    assert not (tmp_path / "out2").exists()


def test_export_tool_without_data_record_refuses(run_dir, tmp_path):
    (run_dir / "data.json").unlink()
    command = ["--checkpoint", run_dir, "--output", tmp_path / "out"]
    assert_refuses("export_hf", command, CheckpointError, location=run_dir / "data.json")
    assert not (tmp_path / "out").exists()


def damage_weights(run_dir):
    [path] = run_dir.glob("checkpoints/*/*.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.parent, "rank-00000.safetensors"


def edit_config(run_dir):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["model"]["rope_base"] = 20000.0
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    return run_dir, "another model"


@pytest.mark.parametrize("damage", [damage_weights, edit_config])
def test_a_damaged_checkpoint_is_neither_exported_nor_evaluated(run_dir, tmp_path, damage):
    location, observed = damage(run_dir)
    command = ["--checkpoint", run_dir, "--output", tmp_path / "out"]
    assert_refuses("export_hf", command, CheckpointError, observed, location=location)
    assert not (tmp_path / "out").exists()
    for load in (load_eval_model, load_with_master_weights):
        with raises(CheckpointError, observed, location=location):
            load(str(run_dir))


@pytest.mark.parametrize(
    ("name", "content", "observed"),
    [("tokenizer.json", None, "fingerprint"), ("tokenizer_config.json", {"bos_token": "</s>"}, "'bos': 1")],
)
def test_export_of_a_run_with_another_tokenizer_refuses(run_dir, tmp_path, name, content, observed):
    path = run_dir / "tokenizer" / name
    path.write_text(json.dumps(content) if content else path.read_text().replace('"w7"', '"w_7"'))
    command = ["--checkpoint", run_dir, "--output", tmp_path / "out"]
    assert_refuses("export_hf", command, DataError, observed, "data.json", location=run_dir / "tokenizer")


@pytest.mark.parametrize("recorded", [True, False, None])
@pytest.mark.parametrize("has_data", [True, False])
def test_export_tool_passes_on_how_special_tokens_in_text_were_encoded(
    run_dir, tmp_path, write_dataset, recorded, has_data
):
    record = read_data_record(run_dir)
    if has_data:  # it is named in config.yaml; of data of earlier versions too, the manifest records it
        known = {"tokenizer": record.tokenizer, "rule": record.rule, "vocab_size": 60}
        manifest = write_dataset(tmp_path / "gone", [[list(range(2, 60))]], special_in_text=True, **known)
        record = record.model_copy(update={"fingerprint": manifest.fingerprint})
    record = record.model_copy(update={"special_in_text": recorded})
    (run_dir / "data.json").write_text(record.model_dump_json())
    ended = call_tool("export_hf", "--checkpoint", run_dir, "--output", tmp_path / "out")
    expected = has_data if recorded is None else recorded
    assert load_exported(tmp_path / "out").data["special_in_text"] is expected
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["split_special_tokens"] is not expected
    assert ("--special-in-text" in ended.output) == (recorded is None and not has_data)
