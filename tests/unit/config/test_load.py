"""Where a run configuration comes from, and what is said of a wrong one."""

from pathlib import Path

import pytest

from megatron_bipe.config.load import Sources, dump_yaml, load_run_config
from megatron_bipe.config.schema import RunConfig
from megatron_bipe.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").rglob("*.yaml"))


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


def test_load_training_length_of_the_model_follows_the_window_unless_given():
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
    ("value", "messages"),
    [
        ("{}", ["data.path.weights={}", "at least 1 item"]),
        ("[]", ["data.path.folders=[]", "at least 1 item"]),
        ("{a: 0, b: -1}", ["weights.a=0: Input should be greater than 0", "weights.b=-1"]),
        ("{a: .nan, b: .inf, c: x}", ["weights.a=nan", "weights.b=inf", "weights.c='x'"]),
        ("[a, 3]", ["data.path.folders.1=3"]),
        ("5", ["data.path=5: Input should be a dataset folder, a list of folders, or a mapping"]),
        ("null", ["data.path=None: Input should be a dataset folder"]),
    ],
)
def test_load_impossible_data_path_says_what_is_wrong_with_the_form_it_has(value, messages):
    with pytest.raises(ConfigError) as error:
        load_run_config(None, [f"data.path={value}"])
    assert all(message in str(error.value) for message in messages)


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
    with pytest.raises(ConfigError, match=f"unknown key '{key}', did you mean '{nearest}'") as error:
        load_run_config(None, [*overrides, f"{key}=4"])
    assert error.value.location == f"--set {key}=4"


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
    with pytest.raises(ConfigError) as error:
        load_run_config(path, ["train.steps=0", "train.seed=2"])
    assert error.value.location == "--set train.steps=0"


def test_load_all_problems_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        load_run_config(None, ["train.steps=0", "model.encoding=rop", "optimizer.betas=[0.9, 1.0]", "oops=1"])
    for part in (
        "train.steps=0",
        "model.encoding='rop': Input should be one of bipe_rope, bipe_alibi,",
        "optimizer.betas",
        "unknown key 'oops'",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "cannot read"),
        ("- 1", "mapping of sections"),
        ("model: 3", "model=3"),
        ("\x00", "cannot read"),
        ("train: {steps: 6}\nmodel: {}\ntrain: {save_every: 3}", "the key 'train' is there twice.* line 3"),
        ("train: {steps: 6, seed: 1, steps: 7}", "the key 'steps' is there twice"),
    ],
)
def test_load_damaged_file_is_one_error_with_its_name(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_run_config(path)
    assert error.value.location == str(path)


def test_load_key_that_an_anchor_brought_may_be_given_anew(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: &a {steps: 6, seed: 3}\noptimizer: {}\n")
    assert load_run_config(path).train.steps == 6
    path.write_text("train: {<<: {steps: 6, seed: 3}, steps: 7}\n")
    train = load_run_config(path).train
    assert (train.steps, train.seed) == (7, 3)


def test_load_missing_file_lists_what_is_there(tmp_path):
    (tmp_path / "there.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"there\.yaml"):
        load_run_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize("override", ["train.steps", "train.steps.deep=1", "train.steps=[1", "data.path={a: 1, a: 2}"])
def test_load_malformed_override_is_refused(override):
    overrides = ["train.steps=5", override] if "deep" in override else [override]
    with pytest.raises(ConfigError):
        load_run_config(None, overrides)
