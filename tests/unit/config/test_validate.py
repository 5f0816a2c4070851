"""Rules that involve several fields."""

from pathlib import Path

import pytest

from megatron_bipe.config.load import Sources, load_run_config
from megatron_bipe.config.validate import accumulation_steps, check_data, validate_run
from megatron_bipe.errors import ConfigError
from tests.helpers.errors import raises


def test_validate_default_run_passes_and_accumulates():
    run = load_run_config(None)
    validate_run(run, num_ranks=8)
    assert accumulation_steps(run.train, 8) == 4


@pytest.mark.parametrize(
    ("overrides", "observed"),
    [
        (["model.num_heads=7"], ["model.hidden_size=768", "model.num_heads=7"]),
        (
            ["model.hidden_size=36", "model.num_heads=12"],
            ["model.hidden_size / model.num_heads = 3", "model.encoding=bipe_rope"],
        ),
        (["model.num_kv_heads=5"], ["model.num_heads=12", "model.num_kv_heads=5"]),
        (
            ["model.encoding=alibi", "model.rope_scaling={type: linear, factor: 2}"],
            ["model.rope_scaling", "model.encoding=alibi"],
        ),
        (
            ["model.encoding=bipe_t5", "model.rope_scaling={type: yarn, factor: 2}"],
            ["model.rope_scaling", "model.encoding=bipe_t5"],
        ),
        (["model.encoding=rope", "model.intra_encoding=none"], ["model.intra_encoding=none", "model.encoding=rope"]),
        (["model.encoding=rope", "model.position_range=9"], ["model.position_range", "model.encoding=rope"]),
        (
            ["model.encoding=learned", "model.train_len_tokens=512"],
            ["train.seq_len_tokens=1024", 512, "model.encoding=learned", "model.train_len_tokens=1024"],
        ),
        (
            ["model.encoding=randomized_rope", "model.position_range=1000"],
            ["train.seq_len_tokens=1024", 1000, "model.encoding=randomized_rope", "model.position_range=1024"],
        ),
        (["model.encoding=sinusoidal", "model.hidden_size=33", "model.num_heads=3"], ["model.hidden_size=33"]),
        (
            ["model.encoding=xpos", "model.hidden_size=36", "model.num_heads=12"],
            ["model.hidden_size / model.num_heads = 3", "model.encoding=xpos"],
        ),
        (
            ["model.rope_scaling={type: yarn, factor: 16}"],
            [
                "model.rope_scaling.type=yarn",
                "model.encoding=bipe_rope",
                "model.rope_scaling.original_positions",
                "model.train_len_tokens=1024",
            ],
        ),
        (
            ["model.encoding=rope", "model.rope_scaling={type: yarn, factor: 16, beta_fast: 1}"],
            ["model.rope_scaling.beta_fast=1", "model.rope_scaling.beta_slow=1"],
        ),
        (
            ["model.rope_scaling={type: yarn, factor: 16, original_positions: 6}"],
            [6, "model.rope_scaling.beta_slow", "linear"],
        ),
        (
            ["model.rope_scaling={type: dynamic, factor: 16, original_positions: 6, beta_slow: 2}"],
            ["model.rope_scaling.beta_slow", "model.rope_scaling.type=dynamic"],
        ),
        (
            ["model.rope_scaling={type: ntk, factor: 16, original_positions: 6}"],
            ["model.rope_scaling.original_positions", "model.rope_scaling.type=ntk"],
        ),
        (
            ["model.encoding=rope", "model.hidden_size=24", "model.rope_scaling={type: ntk, factor: 2}"],
            ["model.rope_scaling.type=ntk", 2],
        ),
        (["model.log_scale=true", "model.train_len_tokens=1"], ["model.log_scale", "model.train_len_tokens=1"]),
        (
            ["model.tied_output=true", "model.zero_last_row=true"],
            ["model.tied_output=True", "model.zero_last_row=True"],
        ),
        (["optimizer.min_lr=1"], ["optimizer.min_lr=1.0", "optimizer.lr=0.0001"]),
        (["train.steps=100"], ["optimizer.warmup_steps=10000", 100, "train.steps", "optimizer.decay_steps"]),
        (["optimizer.decay_start=20000", "optimizer.decay=constant"], ["optimizer.decay_start=20000", "constant"]),
        (["optimizer.decay_start=0", "optimizer.decay=inverse_sqrt"], ["optimizer.decay_start=0", "inverse_sqrt"]),
        (["optimizer.decay_start=500000"], ["optimizer.decay_start=500000", "train.steps=500000"]),
        (
            ["optimizer.decay_start=20000", "optimizer.decay_steps=20000"],
            ["optimizer.decay_start=20000", "optimizer.decay_steps=20000"],
        ),
        (["optimizer.decay_start=9999"], ["optimizer.decay_start=9999", "optimizer.warmup_steps=10000"]),
        (
            ["optimizer.decay=inverse_sqrt", "optimizer.warmup_steps=0"],
            ["optimizer.decay=inverse_sqrt", "optimizer.warmup_steps=0"],
        ),
        (["train.init_from=a", "train.branch_from=b@1"], ["train.init_from=a", "train.branch_from=b@1"]),
        (["train.global_batch=20"], ["train.global_batch=20", "train.micro_batch=8", 2, 16]),
        (["train.global_batch=24"], ["train.global_batch=24", "train.micro_batch=8", 2, 16]),
        (["data.path=a", "data.valid_path=a"], ["data.valid_path=a"]),
        (["data.path=a", "data.valid={b: b, other: ./a}"], ["data.valid.other=a"]),
        (["data.valid_path=b", "data.valid={c: d}"], ["data.valid_path=b", "data.valid={c: d}"]),
        (["train.valid_lengths=[64, 32, 64]"], ["train.valid_lengths=[64, 32, 64]", 64]),
        (["train.valid_lengths=[1]"], ["train.valid_lengths=[1]"]),
        (
            ["model.encoding=learned", "train.valid_lengths=[512, 2048]"],
            ["train.valid_lengths=[512, 2048]", 1024, "model.encoding=learned"],
        ),
        (
            ["parallel.context=2", "train.valid_lengths=[1024, 1025]"],
            ["train.valid_lengths=1025", "parallel.context=2"],
        ),
        (
            ["parallel.tensor=2", "parallel.sequence=true", "train.valid_lengths=[33]"],
            ["train.valid_lengths=33", "parallel.tensor=2"],
        ),
        (
            ["model.encoding=bipe_alibi", "train.seq_len_tokens=65600", "model.intra_size=65600"],
            ["train.seq_len_tokens=65600", 65536, "model.encoding=bipe_alibi"],
        ),
        (
            ["model.encoding=xpos", "train.seq_len_tokens=16386"],
            ["train.seq_len_tokens=16386", 16384, "model.encoding=xpos"],
        ),
        (
            ["model.encoding=learned", "train.seq_len_tokens=66", "model.train_len_tokens=64"],
            ["train.seq_len_tokens=66", 64, "model.encoding=learned", "model.train_len_tokens=66"],
        ),
        (
            ["model.encoding=rope", "model.rope_scaling={type: linear, factor: 2, beta_slow: 2, attention_factor: 2}"],
            ["model.rope_scaling.beta_slow", "model.rope_scaling.attention_factor", "model.rope_scaling.type=linear"],
        ),
        (
            ["model.encoding=randomized_rope", "model.rope_scaling={type: yarn, factor: 2}"],
            [
                "model.rope_scaling.type=yarn",
                "model.encoding=randomized_rope",
                "model.rope_scaling.original_positions",
                4096,
            ],
        ),
        (["data.path={b: 1, a: 2}", "data.valid_path=a"], ["data.valid_path=a"]),
        (["data.path=[b, a]", "data.valid_path=a/"], ["data.valid_path=a"]),
        (["data.path=[b, books, books/]"], ["data.path", "books"]),
        (["data.path={books: 1, b: 1, ./books: 2}"], ["data.path", "books"]),
    ],
)
def test_validate_contradiction_names_the_values(overrides, observed):
    with raises(ConfigError, *observed, location="run.yaml"):
        validate_run(load_run_config(None, overrides), num_ranks=2, sources=Sources(Path("run.yaml")))


@pytest.mark.parametrize(
    ("parallel", "observed"),
    [
        (
            "{tensor: 2, context: 2, pipeline: 3}",
            [8, "parallel.tensor=2", "parallel.context=2", "parallel.pipeline=3", 12],
        ),
        ("{tensor: 8}", ["model.num_heads=12", "model.num_kv_heads=12", "parallel.tensor=8"]),
        ("{context: 8}", ["model.num_heads=12", "model.num_kv_heads=12", "parallel.context=8"]),
        ("{tensor: 4, context: 2}", ["model.num_kv_heads=12", "parallel.tensor=4", "parallel.context=2"]),
        ("{sequence: true}", ["parallel.sequence=True", "parallel.tensor=1"]),
        ("{pipeline: 14}", ["parallel.pipeline=14", 13, "model.num_layers=12"]),
    ],
)
def test_validate_layout_that_does_not_divide_names_the_values(parallel, observed):
    with raises(ConfigError, *observed, location="run.yaml"):
        validate_run(load_run_config(None, [f"parallel={parallel}"]), num_ranks=8, sources=Sources(Path("run.yaml")))


def test_validate_key_value_heads_may_be_replicated_but_not_unevenly():
    model = ["model.hidden_size=384", "model.num_heads=24", "model.num_kv_heads=2"]
    validate_run(load_run_config(None, [*model, "parallel={tensor: 4, context: 2}"]), num_ranks=8)
    with raises(ConfigError, "model.num_kv_heads=3", "parallel.tensor=4", "parallel.context=2"):
        validate_run(load_run_config(None, [*model[:2], "model.num_kv_heads=3", "parallel={tensor: 4, context: 2}"]), 8)
    odd = ["model.hidden_size=24", "model.num_heads=8", "model.num_kv_heads=1", "model.encoding=alibi"]
    with raises(ConfigError, "6 rows", "parallel.tensor=8"):
        validate_run(load_run_config(None, [*odd, "parallel={tensor: 8}"]), 8)


@pytest.mark.parametrize(
    ("parallel", "divisors"),
    [
        ("{context: 4}", ["parallel.context=4"]),
        ("{tensor: 4, sequence: true}", ["parallel.tensor=4"]),
        ("{tensor: 2, context: 2, sequence: true}", ["parallel.context=2", "parallel.tensor=2"]),
    ],
)
def test_validate_context_parallel_sequence_length_must_divide(parallel, divisors):
    run = load_run_config(None, [f"parallel={parallel}", "train.seq_len_tokens=1022"])
    with raises(ConfigError, "train.seq_len_tokens=1022", *divisors):
        validate_run(run, num_ranks=8)


def test_validate_all_problems_are_named_at_once():
    run = load_run_config(None, ["model.num_heads=7", "train.global_batch=20", "optimizer.min_lr=1"])
    with raises(ConfigError, "model.num_heads=7", "train.global_batch=20", "optimizer.min_lr=1.0", location="run.yaml"):
        validate_run(run, num_ranks=2, sources=Sources(Path("run.yaml")))


def _check(overrides, **facts):
    facts = {"vocab_size": 32000, "segments": "reference", "fixed_length": None, "location": "data/x"} | facts
    check_data(load_run_config(None, overrides), **facts)


def test_check_data_fitting_dataset_passes():
    _check([])
    _check(["data.segments=reference"])


@pytest.mark.parametrize(
    ("overrides", "facts", "observed"),
    [
        ([], {"vocab_size": 32001}, ["model.vocab_size=32000", 32001]),
        (["data.segments=newline"], {}, ["data.segments='newline'", "'reference'", "tools/preprocess.py --segments"]),
        (["model.intra_size=1000"], {}, ["model.intra_size=1000", 1024]),
        (["model.intra_size=8"], {"segments": "fixed:9", "fixed_length": 9}, ["model.intra_size=8", 9]),
    ],
)
def test_check_data_disagreement_names_both(overrides, facts, observed):
    with raises(ConfigError, *observed, location="data/x"):
        _check(overrides, **facts)


def test_check_data_small_intra_embedding_is_accepted_if_no_segment_exceeds_it():
    _check(["model.intra_size=8"], segments="fixed:8", fixed_length=8)
    _check(["model.intra_size=8", "model.encoding=rope"])
