"""Sources of a run configuration, and errors in it."""

from pathlib import Path

import pytest

from megatron_bipe.config import RunConfig
from megatron_bipe.config.load import Sources, dump_yaml, load_run_config
from megatron_bipe.errors import ConfigError
from tests.helpers.errors import raises

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))  # studies are another format


def test_load_without_file_is_the_published_151m_recipe():
    run = load_run_config(None)
    assert run == RunConfig()
    assert (run.model.encoding, run.train.global_batch, run.optimizer.lr) == ("bipe_rope", 256, 1e-4)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_load_every_shipped_yaml_is_valid(path):
    from megatron_bipe.config.validate import validate_run

    validate_run(load_run_config(path), num_ranks=1)


def test_load_examples_are_shipped():
    assert len(EXAMPLES) >= 8


def test_load_file_then_overrides_later_ones_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {encoding: alibi}\ntrain: {steps: 7}\n")
    run = load_run_config(path, ["train.steps=8", "train.steps=9", "optimizer.lr=3e-4", "data.path=/x/y"])
    assert (run.model.encoding, run.train.steps, run.optimizer.lr) == ("alibi", 9, 3e-4)
    assert run.data.path == Path("/x/y")


def test_load_training_length_of_the_model_follows_the_sequence_length_unless_given():
    assert load_run_config(None, ["train.seq_len_tokens=256"]).model.train_len_tokens == 256
    both = ["train.seq_len_tokens=4096", "model.train_len_tokens=1024"]
    assert load_run_config(None, both).model.train_len_tokens == 1024


@pytest.mark.parametrize(
    ("value", "folders", "weights"),
    [
        ("data/pile", ["data/pile"], None),
        ("[data/b, data/a]", ["data/b", "data/a"], None),
        ("{data/b: 3, data/a: 0.5}", ["data/b", "data/a"], (3.0, 0.5)),
    ],
)
def test_load_data_path_is_one_folder_or_a_blend_in_the_order_given(tmp_path, value, folders, weights):
    run = load_run_config(None, [f"data.path={value}"])
    assert (run.data.folders, run.data.weights) == (tuple(map(Path, folders)), weights)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(run))
    assert load_run_config(path) == run
    assert load_run_config(path).data.folders == run.data.folders


def test_load_one_weight_of_a_blend_can_be_overridden(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {path: {data/a: 1, data/b: 2}}\n")
    assert load_run_config(path, ["data.path.data/b=5"]).data.weights == (1.0, 5.0)
    assert load_run_config(path, ["data.path=data/c"]).data.folders == (Path("data/c"),)


@pytest.mark.parametrize(
    ("value", "observed"),
    [
        ("{}", ["data.path.weights={}"]),
        ("[]", ["data.path.folders=[]"]),
        ("{a: 0, b: -1}", ["data.path.weights.a=0", "data.path.weights.b=-1"]),
        ("{a: .nan, b: .inf, c: x}", ["data.path.weights.a=nan", "data.path.weights.b=inf", "data.path.weights.c='x'"]),
        ("[a, 3]", ["data.path.folders.1=3"]),
        ("5", ["data.path=5"]),
        ("null", ["data.path=None"]),
    ],
)
def test_load_invalid_data_path_names_the_problem_of_its_form(value, observed):
    with raises(ConfigError, *observed, location=f"--set data.path={value}"):
        load_run_config(None, [f"data.path={value}"])


def test_dump_then_load_is_the_same_run(tmp_path):
    run = load_run_config(
        None, ["model.rope_scaling={type: linear, factor: 4}", "data.valid_path=v", "model.encoding=rope"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(run))
    assert load_run_config(path) == run


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("model.hiden_size", "model.hidden_size"),
        ("train.lr", "optimizer.lr"),
        ("optimizer.warmup", "optimizer.warmup_steps"),
        ("modle", "model"),
        ("model.rope_scaling.kind", "model.rope_scaling"),
        ("model.rope_scaling.beta_fats", "model.rope_scaling.beta_fast"),
    ],
)
def test_load_unknown_key_names_the_nearest_one(key, nearest):
    value = "{type: linear, factor: 2}" if "rope" in key else "4"
    overrides = [f"model.rope_scaling={value}"] if "rope" in key else []
    with raises(ConfigError, f"'{key}'", f"'{nearest}'", location=f"--set {key}=4"):
        load_run_config(None, [*overrides, f"{key}=4"])


@pytest.mark.parametrize(
    ("message", "location"),
    [
        ("train.steps=7 and optimizer.lr=1 disagree", "--set train.steps=7"),
        (
            "optimizer.warmup_steps=20 exceeds the 7 of train.steps",
            "--set train.steps=7 --set optimizer.warmup_steps=20",
        ),
        ("model.rope_scaling.type=yarn has no meaning", "--set model.rope_scaling={type: yarn}"),
        ("train.steps_ahead=7 and other.train.steps", "run.yaml"),
        ("model.num_heads=3", "run.yaml"),
    ],
)
def test_location_of_a_message_is_the_options_that_it_names_else_the_file(message, location):
    overrides = ("train.steps=7", "optimizer.warmup_steps=20", "model.rope_scaling={type: yarn}")
    assert Sources(Path("run.yaml"), overrides).location(message) == location


def test_load_error_in_a_set_option_names_the_option_and_not_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {seed: 3}")
    with raises(ConfigError, "train.steps=0", location="--set train.steps=0"):
        load_run_config(path, ["train.steps=0", "train.seed=2"])


def test_load_all_problems_are_named_at_once():
    encoding = ("model.encoding='rop'", "bipe_rope", "bipe_alibi", "randomized_rope")
    with raises(ConfigError, "train.steps=0", *encoding, "optimizer.betas.1=1.0", "'oops'"):
        load_run_config(None, ["train.steps=0", "model.encoding=rop", "optimizer.betas=[0.9, 1.0]", "oops=1"])


@pytest.mark.parametrize(
    ("text", "observed"),
    [
        ("model: [", ["line 1, column 9"]),
        ("- 1", ["list"]),
        ("model: 3", ["model=3"]),
        ("\x00", ["#x0000"]),
        ("train: {steps: 6}\nmodel: {}\ntrain: {save_every: 3}", ["'train'", "line 3"]),
        ("train: {steps: 6, seed: 1, steps: 7}", ["'steps'", "column 28"]),
    ],
)
def test_load_damaged_file_is_one_error_with_its_name(tmp_path, text, observed):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with raises(ConfigError, *observed, location=path):
        load_run_config(path)


def test_load_key_from_an_anchor_may_be_overridden(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: &a {steps: 6, seed: 3}\noptimizer: {}\n")
    assert load_run_config(path).train.steps == 6
    path.write_text("train: {<<: {steps: 6, seed: 3}, steps: 7}\n")
    train = load_run_config(path).train
    assert (train.steps, train.seed) == (7, 3)


def test_load_missing_file_lists_what_is_there(tmp_path):
    (tmp_path / "there.yaml").write_text("")
    with raises(ConfigError, location=tmp_path / "absent.yaml", remedy=tmp_path / "there.yaml"):
        load_run_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("override", "observed"),
    [
        ("train.steps", "'train.steps'"),
        ("train.steps.deep=1", "'steps'"),
        ("trian.steps=1", "'trian'"),
        ("train.steps=[1", "'[1'"),
        ("data.path={a: 1, a: 2}", "'a'"),
    ],
)
def test_load_malformed_override_is_refused(override, observed):
    overrides = ["train.steps=5", override] if "deep" in override else [override]
    with raises(ConfigError, observed, location=f"--set {override}"):
        load_run_config(None, overrides)


@pytest.mark.parametrize("value", ["~/runs/a", "$HOME/runs", "''"])
@pytest.mark.parametrize("key", ["run_dir", "data.path", "data.valid_path", "train.init_from"])
def test_load_path_with_shell_syntax_is_refused(key, value):
    with raises(ConfigError, key):
        load_run_config(None, [f"{key}={value}"])


@pytest.mark.parametrize("key", ["train.steps", "optimizer.lr", "checkpoint.keep_last", "model.rope_scaling"])
def test_load_switch_for_a_number_is_refused(key):
    with raises(ConfigError, f"{key}=True", "switch"):
        load_run_config(None, [f"{key}=yes"])


def test_load_switch_takes_yes_and_no():
    run = load_run_config(None, ["data.verify=no", "model.tied_output=yes"])
    assert run.model.tied_output and not run.data.verify
