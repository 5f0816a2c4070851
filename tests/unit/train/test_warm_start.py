"""Changes of a model's configuration that a run started from it may make."""

import shlex

import pytest
from torch import nn

from megatron_bipe.checkpoint.find import read_data_record
from megatron_bipe.config import ModelConfig, RopeScaling
from megatron_bipe.config.load import load_run_config
from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.eval_model import EvalModel
from megatron_bipe.train.warm_start import _differences, start_run
from tests.helpers.errors import assert_warned, raises


@pytest.mark.parametrize(
    ("encoding", "changes", "named"),
    [
        ("bipe_rope", {"train_len_tokens": 64, "init_std": 0.3, "rope_scaling": RopeScaling(type="ntk", factor=2)}, []),
        ("learned", {"train_len_tokens": 64, "init_std": 0.3}, ["train_len_tokens"]),
        ("randomized_rope", {"train_len_tokens": 64}, ["train_len_tokens"]),
        ("alibi", {"train_len_tokens": 64}, []),  # its longest sequence differs
        ("sinusoidal", {"train_len_tokens": 64, "init_std": 0.3}, ["init_std"]),
        ("bipe_t5", {"intra_encoding": "none", "encoding": "bipe_nope"}, ["encoding", "intra_encoding"]),
    ],
)
def test_differences_name_what_is_built_into_the_weights(encoding, changes, named):
    model = ModelConfig(encoding=encoding, train_len_tokens=32)
    found = _differences(model, model.model_copy(update=changes))
    assert [key for key, _, _ in found] == named


def test_differences_include_removing_an_option_of_the_trained_model():
    plain = ModelConfig(encoding="bipe_rope")
    stretched = plain.model_copy(update={"rope_scaling": RopeScaling(type="ntk", factor=2), "log_scale": True})
    further = stretched.model_copy(update={"rope_scaling": RopeScaling(type="ntk", factor=4)})
    assert {key for key, _, _ in _differences(stretched, plain)} == {"rope_scaling", "log_scale"}
    assert not [*_differences(plain, stretched), *_differences(stretched, further)]


@pytest.mark.parametrize(
    ("own", "wanted", "is_refused"),
    [
        ({"type": "dynamic"}, {"type": "dynamic"}, True),
        ({"type": "yarn"}, {"type": "yarn"}, True),
        ({"type": "linear"}, {"type": "linear"}, False),
        ({"type": "dynamic", "original_positions": 32}, {"type": "dynamic", "original_positions": 32}, False),
        ({"type": "dynamic"}, {"type": "dynamic", "original_positions": 32}, False),
        (None, {"type": "yarn"}, False),
    ],
)
def test_training_length_to_which_a_scaling_refers_must_stay(own, wanted, is_refused):
    first, second = (given and RopeScaling(factor=2, **given) for given in (own, wanted))
    model = ModelConfig(encoding="rope", train_len_tokens=32, rope_scaling=first)
    run = model.model_copy(update={"train_len_tokens": 64, "rope_scaling": second})
    assert [key for key, _, _ in _differences(model, run)] == ["train_len_tokens"] * is_refused


def test_training_length_to_which_log_scale_refers_must_stay():
    model = ModelConfig(encoding="rope", train_len_tokens=32, log_scale=True)
    assert [*_differences(model, model.model_copy(update={"train_len_tokens": 64}))] == [("train_len_tokens", 32, 64)]


def test_remedy_for_another_model_is_what_the_command_line_takes(tmp_path):
    scaling = RopeScaling(type="yarn", factor=2, original_positions=75)
    model = ModelConfig(encoding="randomized_rope", rope_scaling=scaling, zero_last_row=True)
    asked = [f"run_dir={tmp_path}", "model.encoding=randomized_rope", "model.position_range=5000"]
    run = load_run_config(None, asked)
    with raises(ConfigError, "position_range", 5000, "rope_scaling", location="m", remedy="--set=") as error:
        start_run(run, EvalModel("m", "m", nn.Sequential(), model, None, None), {})
    words = [word for word in shlex.split(error.value.remedy) if word.startswith("--set=model.")]
    assert len(words) == 3
    corrected = load_run_config(None, [*asked, *(word.removeprefix("--set=") for word in words)])
    assert not list(_differences(model, corrected.model))


def test_start_on_data_with_other_ids_of_special_tokens_in_text_is_warned_about(tmp_path, write_text_dataset, caplog):
    manifest = write_text_dataset(tmp_path / "data", [["a b c d e f g h i j"]])
    manifest.model_copy(update={"source": {"special_in_text": True}}).save(tmp_path / "data")
    asked = {"run_dir": tmp_path / "run", "data.path": tmp_path / "data", "data.segments": "newline"}
    shape = {"model.vocab_size": manifest.tokenizer.vocab_size, "train.seq_len_tokens": 8}
    run = load_run_config(None, [f"{key}={value}" for key, value in (asked | shape).items()])
    model = EvalModel("m", "m", nn.Sequential(), run.model, manifest.tokenizer.fingerprint, manifest.rule)
    for before, name in ((None, "a"), (True, "b"), (False, "c")):
        assert not caplog.records
        started = run.model_copy(update={"run_dir": tmp_path / name})
        start_run(started, model._replace(special_in_text=before), {})
        assert read_data_record(started.run_dir).special_in_text is True
    assert_warned(caplog, "m was trained", "without --special-in-text", "with --special-in-text")
