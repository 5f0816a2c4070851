import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from megatron_bipe.config.schema import RopeScaling
from megatron_bipe.data.segments import SegmentRule, bilevel_ids, segment_ends
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import CheckpointError
from megatron_bipe.hf import export as export_module
from megatron_bipe.hf.export import TOLERANCE, ExportOptions, export_model
from megatron_bipe.hf.load import load_exported
from megatron_bipe.hf.tokenizer_files import HARD_TEXTS, TokenizerSource, check_tokenizer
from megatron_bipe.hf.weights import to_llama
from tests.helpers.paths import LLAMA

FP32 = ExportOptions(dtype=torch.float32, title="Tiny", facts={"Recipe": "steps: 3", "Data": "a|b"})
ENCODINGS = ("bipe_rope", "bipe_alibi", "rope", "alibi")


@pytest.fixture
def windows(tokens_of):
    tokens = tokens_of(2, 40)
    rule = SegmentRule(spec="[3,5]", token_ids=(3, 5))
    return (tokens, *map(torch.from_numpy, bilevel_ids(segment_ends(tokens.numpy(), rule), 11)))


def left_behind(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_model_loads_through_auto_classes_and_is_the_plan(
    tmp_path, encoding, dtype, tiny, plan_of, fields, windows
):
    config = tiny(encoding=encoding, num_kv_heads=2)
    plan = plan_of(config)
    figure = export_model(
        plan.state_dict(), config, tmp_path / "m-1.0", fields, windows, None, FP32._replace(dtype=dtype)
    )
    assert figure < TOLERANCE
    assert left_behind(tmp_path) == ["m-1.0"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m-1.0", trust_remote_code=encoding != "rope")
    assert model.dtype == dtype
    for name, weight in to_llama(plan.state_dict(), config).items():
        assert torch.equal(model.state_dict()[name], weight.to(dtype))
    if dtype == torch.float32:
        with torch.no_grad():
            found, expected = model(windows[0]).logits, plan(windows)
        assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE
    if encoding.startswith("bipe"):
        assert all(torch.equal(*pair) for pair in zip(model.bilevel_ids(windows[0]), windows[1:], strict=True))


@pytest.mark.parametrize("encoding", ["bipe_alibi", "rope"])
def test_exported_model_with_tied_output_has_one_table_and_is_the_plan(
    tmp_path, encoding, tiny, plan_of, fields, windows
):
    config = tiny(encoding=encoding, tied_output=True)
    plan = plan_of(config)
    weights = dict(plan.named_parameters())  # as a checkpoint has them: the table once
    export_model(weights, config, tmp_path / "m", fields, windows, None, FP32)
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=encoding != "rope")
    with torch.no_grad():
        found, expected = model(windows[0]).logits, plan(windows)
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE
    loaded = load_exported(tmp_path / "m")
    assert loaded.config.tied_output
    with torch.no_grad():
        assert torch.equal(loaded.model(windows), expected)


def test_export_of_rope_is_a_stock_llama(tmp_path, tiny, plan_of, fields, windows):
    config = tiny(encoding="rope", rope_scaling=RopeScaling(type="linear", factor=2.0), num_kv_heads=2)
    export_model(plan_of(config).state_dict(), config, tmp_path / "m", fields, windows, None, FP32)
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "auto_map" not in settings
    assert not list((tmp_path / "m").glob("*.py"))
    assert settings["segments"] == {"spec": "[3,5]", "token_ids": [3, 5]}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(model) is LlamaForCausalLM
    assert model.generation_config.use_cache is not False


@pytest.mark.parametrize(
    "changes", [{"log_scale": True}, {"rope_scaling": RopeScaling(type="dynamic", factor=2.0)}], ids=str
)
def test_export_of_rope_as_llama_does_not_have_it_is_remote_code(tmp_path, tiny, plan_of, fields, windows, changes):
    config = tiny(encoding="rope", **changes)
    export_model(plan_of(config).state_dict(), config, tmp_path / "m", fields, windows, None, FP32)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "bipe"
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation.get("use_cache", True) == ("log_scale" in changes)  # else cached keys would go stale


def test_export_writes_everything_a_user_needs(tmp_path, tiny, plan_of, fields, windows):
    config = tiny()
    options = FP32._replace(max_shard_bytes=20_000)
    export_model(plan_of(config).state_dict(), config, tmp_path / "m", fields, windows, None, options)
    files = left_behind(tmp_path / "m")
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors.index.json"} <= set(files)
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 1
    names = [name for shard in shards for name in load_file(shard)]
    assert sorted(names) == sorted(to_llama(plan_of(config).state_dict(), config))
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "m").iterdir())
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (1, 2)
    assert settings["tokenizer_fingerprint"] == "f" * 64
    card = (tmp_path / "m" / "README.md").read_text()
    for needed in ("# Tiny", "steps: 3", "a\\|b", "`[3,5]`, separator ids 3, 5", "of the largest logit", "f" * 64):
        assert needed in card
    assert "trust_remote_code=True" in card


def run_python(code, folder, tmp_path):
    """Run `code` with `folder` in a fresh process, and give the words of the lines that it prints after a ">"."""
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [word for line in done.stdout.splitlines() if line.startswith("> ") for word in line[2:].split()]


WITHOUT_THE_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "megatron_bipe":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
load = AutoModelForCausalLM.from_pretrained
"""


def test_remote_code_runs_where_this_package_is_not_installed_and_travels_on(tmp_path, tiny, plan_of, fields, windows):
    config = tiny()
    export_model(plan_of(config).state_dict(), config, tmp_path / "m", fields, windows, None, FP32)
    code = """
model = load(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[1] + "-saved")
for each in (model, load(sys.argv[1] + "-saved", trust_remote_code=True)):
    torch.manual_seed(0)
    print(">", *each.generate(torch.tensor([[6, 3, 7]]), max_new_tokens=3, eos_token_id=None)[0].tolist())
"""
    printed = run_python(WITHOUT_THE_PACKAGE + code, tmp_path / "m", tmp_path)
    assert printed[:3] == ["6", "3", "7"] and len(printed) == 12
    assert printed[:6] == printed[6:]


def test_two_versions_of_remote_code_under_one_name_do_not_mix(tmp_path, monkeypatch, tiny, plan_of, fields, windows):
    config, source = tiny(), Path(export_module.__file__).parent
    export_model(plan_of(config).state_dict(), config, tmp_path / "a" / "m", fields, windows, None, FP32)
    for name in export_module.REMOTE_CODE:
        (tmp_path / name).write_text((source / name).read_text())
    with (tmp_path / "modeling_bipe.py").open("a") as code:
        code.write("\n\nBipeForCausalLM.version = 2\n")
    monkeypatch.setattr(export_module, "__file__", str(tmp_path / "export.py"))
    export_model(plan_of(config).state_dict(), config, tmp_path / "b" / "m", fields, windows, None, FP32)
    code = """
for part in ("a", "b", "a"):
    print(">", getattr(load(f"{sys.argv[1]}/{part}/m", trust_remote_code=True), "version", 1))
"""
    assert run_python(WITHOUT_THE_PACKAGE + code, tmp_path, tmp_path) == ["1", "2", "1"]


@pytest.mark.parametrize("trust", [None, True])
def test_importing_the_package_registers_its_models(trust, tmp_path, tiny, plan_of, fields, windows):
    config = tiny()
    export_model(plan_of(config).state_dict(), config, tmp_path / "m", fields, windows, None, FP32)
    code = f"""
import sys
import megatron_bipe.hf
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
    print(">", type(auto.from_pretrained(sys.argv[1], trust_remote_code={trust})).__module__)
"""
    package = "megatron_bipe.hf."
    expected = [package + name for name in ("configuration_bipe", "modeling_bipe", "modeling_bipe")]
    assert run_python(code, tmp_path / "m", tmp_path) == expected


def test_export_with_wrong_segment_rule_leaves_nothing(tmp_path, tiny, plan_of, fields, windows):
    config = tiny()
    wrong = fields._replace(token_ids=(3,))
    with pytest.raises(CheckpointError, match=r"logits differ by \d\.\d\de[-+]\d\d of the largest, allowed are 2e-05"):
        export_model(plan_of(config).state_dict(), config, tmp_path / "m", wrong, windows, None, FP32)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    "mistake",
    [
        ("96.0", "95.0", "bipe_alibi"),
        ("closed_BT - ends_BT.long()", "closed_BT", "bipe_rope"),
        ("places.inter if config.bilevel else places.intra", "places.inter", "alibi"),
    ],
)
def test_export_of_small_mistake_at_initial_weights_is_caught(
    tmp_path, monkeypatch, mistake, tiny, plan_of, fields, windows
):
    """At std 0.02 attention is nearly flat: the limit must be tight enough even then."""
    right, wrong, encoding = mistake
    config = tiny(encoding=encoding, init_std=0.02)
    source = Path(export_module.__file__).parent
    for name in export_module.REMOTE_CODE:
        text = (source / name).read_text()
        (tmp_path / name).write_text(text.replace(right, wrong))
    assert any((tmp_path / name).read_text() != (source / name).read_text() for name in export_module.REMOTE_CODE)
    monkeypatch.setattr(export_module, "__file__", str(tmp_path / "export.py"))
    with pytest.raises(CheckpointError, match="logits differ"):
        export_model(plan_of(config).state_dict(), config, tmp_path / "out" / "m", fields, windows, None, FP32)
    assert left_behind(tmp_path / "out") == []


def test_export_over_something_else_refuses(tmp_path, tiny, plan_of, fields, windows):
    config, target = tiny(), tmp_path / "m"

    def export(**changes):
        options = FP32._replace(**changes)
        export_model(plan_of(config).state_dict(), config, target, fields, windows, None, options)

    target.mkdir()
    (target / "thesis.tex").write_text("precious")
    for overwrite, message in ((False, "exists already"), (True, "is no model folder")):
        with pytest.raises(CheckpointError, match=message):
            export(overwrite=overwrite)
    assert left_behind(target) == ["thesis.tex"]
    (target / "thesis.tex").unlink()
    export(overwrite=True)
    before = (target / "config.json").stat().st_ino
    with pytest.raises(CheckpointError, match="exists already"):
        export()
    export(overwrite=True)
    assert (target / "config.json").stat().st_ino != before
    assert left_behind(tmp_path) == ["m"]
    for name in ("notes.md", "model.bin", ".git", "model.safetensors.old"):
        (target / name).mkdir()
        with pytest.raises(CheckpointError, match=f"holds what no export writes: {name}"):
            export(overwrite=True)
        (target / name).rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").rmdir()
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "m"
    with pytest.raises(CheckpointError, match="no folder can be made there: File exists"):
        export()


@pytest.mark.parametrize("failing", [1, 2])
def test_export_that_cannot_take_the_place_of_another_leaves_that(
    tmp_path, tiny, plan_of, fields, windows, monkeypatch, failing
):
    config, target, calls, rename = tiny(), tmp_path / "m", [], Path.rename
    arguments = plan_of(config).state_dict(), config, target, fields, windows, None
    export_model(*arguments, FP32)
    before = (target / "config.json").stat().st_ino

    def fails(self, to):
        calls.append(to)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space left"):
        export_model(*arguments, FP32._replace(overwrite=True))
    assert (target / "config.json").stat().st_ino == before
    assert left_behind(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"hidden_size": 40}, "do not fit"), ({"ffn_size": 40}, "do not fit"), ({"num_layers": 1}, "is missing")],
)
def test_export_of_weights_of_another_model_refuses(tmp_path, changes, message, tiny, plan_of, fields, windows):
    with pytest.raises(CheckpointError, match=message):
        export_model(plan_of(tiny()).state_dict(), tiny(**changes), tmp_path / "m", fields, windows, None, FP32)
    assert left_behind(tmp_path) == []


def source_of(folder):
    tokenizer = load_tokenizer(folder)
    return TokenizerSource(tokenizer.definition, tokenizer.to_json(), tokenizer.special_ids, tokenizer.encode_batch)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    text = "The end . Of it...\n\tdef f(x): return 10 * x  # héé ﬁne 漢字\n".splitlines(keepends=True)
    path.write_text("".join(line * 3 for line in text) + Path(__file__).read_text("utf-8"), "utf-8")
    return path


def sentencepiece_folder(folder, text_file):
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text_file),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return folder


def byte_level_folder(folder, text_file):
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train([str(text_file)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("make", [sentencepiece_folder, byte_level_folder])
@pytest.mark.parametrize("encoding", ["bipe_rope", "rope"])  # remote code and stock choose tokenizers differently
def test_exported_tokenizer_gives_training_ids(tmp_path, make, encoding, text_file, tiny, plan_of, fields, windows):
    folder = make(tmp_path / "tokenizer", text_file)
    config, source = tiny(encoding=encoding, vocab_size=520), source_of(folder)
    export_model(plan_of(config).state_dict(), config, tmp_path / "m", fields, windows, source, FP32)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "m", trust_remote_code=True)
    trained = load_tokenizer(folder)
    for text, ids in zip(HARD_TEXTS, trained.encode_batch(HARD_TEXTS), strict=True):
        assert loaded(text).input_ids == [trained.bos_id, *ids.tolist()]
        assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == trained.decode(ids.tolist())
    assert loaded.padding_side == "left"
    assert set(loaded("a")) == {"input_ids", "attention_mask"}  # what `generate` of either class takes


def test_exported_llama_tokenizer_gives_training_ids(tmp_path, tiny, plan_of, fields, windows):
    if not LLAMA.is_dir():
        pytest.skip(reason="the LLaMA tokenizer is not beside the repository")
    config = tiny(encoding="rope", vocab_size=32000, hidden_size=8, num_heads=1, num_layers=1)
    export_model(plan_of(config).state_dict(), config, tmp_path / "m", fields, windows, source_of(LLAMA), FP32)
    check_tokenizer(tmp_path / "m", source_of(LLAMA))
    assert load_tokenizer(tmp_path / "m").fingerprint == load_tokenizer(LLAMA).fingerprint


def test_export_with_another_tokenizer_than_training_refuses(tmp_path, text_file, tiny, plan_of, fields, windows):
    config = tiny(vocab_size=520)
    trained = source_of(sentencepiece_folder(tmp_path / "a", text_file))
    files = source_of(byte_level_folder(tmp_path / "b", text_file))
    mixed = files._replace(encode=trained.encode)
    with pytest.raises(CheckpointError, match="AutoTokenizer gives other ids than training"):
        export_model(plan_of(config).state_dict(), config, tmp_path / "out" / "m", fields, windows, mixed, FP32)
    assert left_behind(tmp_path / "out") == []


def test_export_with_tokenizer_beyond_the_table_refuses(tmp_path, text_file, tiny, plan_of, fields, windows):
    source = source_of(byte_level_folder(tmp_path / "b", text_file))
    with pytest.raises(CheckpointError, match="ids up to 399, the model's token table 64 rows"):
        export_model(plan_of(tiny()).state_dict(), tiny(), tmp_path / "m", fields, windows, source, FP32)


def test_exported_config_reads_back_unchanged(tmp_path, tiny, plan_of, fields, windows):
    config = tiny(rope_scaling=RopeScaling(type="linear", factor=2.5), rope_base=777.0)
    export_model(plan_of(config).state_dict(), config, tmp_path / "m", fields, windows, None, FP32)
    loaded = AutoConfig.from_pretrained(tmp_path / "m", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    for key, value in json.loads((tmp_path / "m" / "config.json").read_text()).items():
        if key not in ("auto_map", "architectures", "dtype") and value is not None:
            assert again[key] == value, key
    assert dataclasses.asdict(loaded)["rope_parameters"] == {"rope_type": "linear", "factor": 2.5, "rope_theta": 777.0}
