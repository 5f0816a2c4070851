"""Rules across fields."""

from pathlib import Path

import pytest

from megatron_bipe.config.load import Sources, load_run_config
from megatron_bipe.config.validate import accumulation_steps, check_data, validate_run
from megatron_bipe.errors import ConfigError


def test_validate_default_run_passes_and_accumulates():
    run = load_run_config(None)
    validate_run(run, num_ranks=8)
    assert accumulation_steps(run.train, 8) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_heads=7"], "model.hidden_size=768 is not a multiple of model.num_heads=7"),
        (["model.hidden_size=36", "model.num_heads=12"], "is odd"),
        (["model.num_kv_heads=5"], "not a multiple of model.num_kv_heads=5"),
        (["model.encoding=alibi", "model.rope_scaling={type: linear, factor: 2}"], "has no meaning"),
        (["model.encoding=bipe_t5", "model.rope_scaling={type: yarn, factor: 2}"], "rope_scaling has no meaning"),
        (
            ["model.encoding=rope", "model.intra_encoding=none"],
            "model.intra_encoding=none has no meaning for model.enc",
        ),
        (["model.encoding=rope", "model.position_range=9"], "model.position_range has no meaning"),
        (
            ["model.encoding=learned", "model.train_len_tokens=512"],
            "seq_len_tokens=1024 exceeds the 512 that model.encoding=learned encodes; set model.train_len_tokens=1024",
        ),
        (
            ["model.encoding=randomized_rope", "model.position_range=1000"],
            "exceeds the 1000 that model.encoding=randomized_rope encodes; set model.position_range=1024 or more",
        ),
        (["model.encoding=sinusoidal", "model.hidden_size=33", "model.num_heads=3"], "sines go with cosines"),
        (["model.encoding=xpos", "model.hidden_size=36", "model.num_heads=12"], "3 is odd, and model.encoding=xpos"),
        (
            ["model.rope_scaling={type: yarn, factor: 16}"],
            "without original_positions, and .*bipe_rope counts segments",
        ),
        (
            ["model.encoding=rope", "model.rope_scaling={type: yarn, factor: 16, beta_fast: 1}"],
            "beta_fast=1 does not exceed model.rope_scaling.beta_slow=1",
        ),
        (
            ["model.rope_scaling={type: yarn, factor: 16, original_positions: 6}"],
            "in the 6 original positions .* no pair of channels turns 1 times",
        ),
        (
            ["model.encoding=rope", "model.hidden_size=24", "model.rope_scaling={type: ntk, factor: 2}"],
            "heads of 2 channels have no other",
        ),
        (["model.log_scale=true", "model.train_len_tokens=1"], "2 is the least"),
        (["model.tied_output=true", "model.zero_last_row=true"], "trains the last row"),
        (["optimizer.min_lr=1"], "exceeds optimizer.lr"),
        (["train.steps=100"], "optimizer.warmup_steps=10000 exceeds the 100 steps"),
        (["train.global_batch=20"], "train.global_batch=20 is not a multiple of train.micro_batch=8 x 2"),
        (["data.path=a", "data.valid_path=a"], "is the training set"),
        (
            ["model.encoding=bipe_alibi", "train.seq_len_tokens=65600", "model.intra_size=65600"],
            "train.seq_len_tokens=65600 exceeds the 65536 that model.encoding=bipe_alibi encodes; use a shorter window",
        ),
        (["model.encoding=xpos", "train.seq_len_tokens=16386"], "exceeds the 16384 that model.encoding=xpos encodes"),
        (
            ["model.encoding=learned", "train.seq_len_tokens=66", "model.train_len_tokens=64"],
            "exceeds the 64 that model.encoding=learned encodes; set model.train_len_tokens=66 or more",
        ),
        (
            ["model.encoding=rope", "model.rope_scaling={type: linear, factor: 2, beta_slow: 2, attention_factor: 2}"],
            "scaling.beta_slow has no meaning for model.rope_scaling.type=linear.*scaling.attention_factor has",
        ),
        (
            ["model.encoding=randomized_rope", "model.rope_scaling={type: yarn, factor: 2}"],
            "draws positions; set model.rope_scaling.original_positions to .* drawn from, 4096 as configured",
        ),
        (["data.path={b: 1, a: 2}", "data.valid_path=a"], "data.valid_path=a is the training set"),
        (["data.path=[b, a]", "data.valid_path=a/"], "data.valid_path=a is the training set"),
        (["data.path=[b, a, a/]"], "data.path names a more than once"),
        (["data.path={a: 1, b: 1, ./a: 2}"], "data.path names a more than once"),
    ],
)
def test_validate_contradiction_names_values_and_rule(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate_run(load_run_config(None, overrides), num_ranks=2, sources=Sources(Path("run.yaml")))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            "{tensor: 2, context: 2, pipeline: 3}",
            "a launch of 8 ranks does not hold whole copies of parallel.tensor=2 x parallel.context=2 x "
            "parallel.pipeline=3 = 12 ranks; start a multiple of 12",
        ),
        ("{tensor: 8}", "model.num_heads=12 is not a multiple of parallel.tensor=8, which splits it"),
        ("{context: 8}", "model.num_heads=12 is not a multiple of parallel.context=8, which splits it"),
        (
            "{tensor: 4, context: 2}",
            "model.num_kv_heads=12 is not a multiple of parallel.tensor=4 x parallel.context=2, which splits it",
        ),
        ("{sequence: true}", "parallel.tensor=1; make it false"),
        (
            "{pipeline: 14}",
            "parallel.pipeline=14 exceeds 13, a stage for each of the model.num_layers=12 blocks",
        ),
    ],
)
def test_validate_layout_that_does_not_divide_names_values_and_rule(parallel, message):
    with pytest.raises(ConfigError) as error:
        validate_run(load_run_config(None, [f"parallel={parallel}"]), num_ranks=8, sources=Sources(Path("run.yaml")))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("parallel", "divisor"),
    [
        ("{context: 4}", "parallel.context=4"),
        ("{tensor: 4, sequence: true}", "parallel.tensor=4"),
        ("{tensor: 2, context: 2, sequence: true}", "parallel.context=2 x parallel.tensor=2"),
    ],
)
def test_validate_window_that_is_split_must_divide(parallel, divisor):
    run = load_run_config(None, [f"parallel={parallel}", "train.seq_len_tokens=1022"])
    with pytest.raises(ConfigError, match=f"train.seq_len_tokens=1022 is not a multiple of {divisor}"):
        validate_run(run, num_ranks=8)


def test_validate_all_problems_are_named_at_once():
    run = load_run_config(None, ["model.num_heads=7", "train.global_batch=20", "optimizer.min_lr=1"])
    with pytest.raises(ConfigError) as error:
        validate_run(run, num_ranks=2, sources=Sources(Path("run.yaml")))
    assert str(error.value).count(";") >= 2
    assert error.value.location == "run.yaml"


def _check(overrides, **facts):
    facts = {"vocab_size": 32000, "segments": "reference", "fixed_length": None, "place": "data/x"} | facts
    check_data(load_run_config(None, overrides), **facts)


def test_check_data_fitting_dataset_passes():
    _check([])
    _check(["data.segments=reference"])


@pytest.mark.parametrize(
    ("overrides", "facts", "message"),
    [
        ([], {"vocab_size": 32001}, "model.vocab_size=32000 is smaller than the 32001"),
        (["data.segments=newline"], {}, "data.segments='newline', but the dataset was made with 'reference'"),
        (["model.intra_size=1000"], {}, "model.intra_size=1000 is smaller than the longest possible segment of 1024"),
        (["model.intra_size=8"], {"segments": "fixed:9", "fixed_length": 9}, "segment of 9 tokens"),
    ],
)
def test_check_data_disagreement_names_both(overrides, facts, message):
    with pytest.raises(ConfigError, match=message):
        _check(overrides, **facts)


def test_check_data_small_intra_table_is_fine_where_no_segment_exceeds_it():
    _check(["model.intra_size=8"], segments="fixed:8", fixed_length=8)
    _check(["model.intra_size=8", "model.encoding=rope"])
