"""Communication of ranks in a step."""

import pytest

from megatron_bipe.config.deepspeed import engine_config
from megatron_bipe.config.load import load_run_config
from megatron_bipe.estimate.communication import bubble, step_traffic

BF16 = ["train.precision=bf16"]  # tests mean the same on every machine

PARAMETERS = 163_203_840
HIDDEN = 8 * 1024 * 768 * 2  # bytes of a micro-batch of the default run in bf16


def sent(zero, num_ranks, *settings, options=None, **more):
    run = load_run_config(None, [*BF16, *settings])
    ds_config = engine_config(run, {"zero_optimization": {"stage": zero} | (options or {})} | more, num_ranks, "")
    found = step_traffic(run, ds_config, num_ranks)
    return {(kind.axis, kind.what): (kind.times, kind.bytes_sent) for kind in found}


def test_tensor_ranks_sum_four_times_a_block_and_twice_around():
    times = 16 * (4 * 12 + 2)  # 16 micro-batches, as tests/distributed/test_tensor_parallel.py counts a block's sums
    assert sent(0, 4, "parallel.tensor=2")["tensor", "all-reduces"] == (times, times * HIDDEN)
    assert sent(0, 4, "parallel.tensor=4", "train.global_batch=128")["tensor", "all-reduces"] == (
        times,
        times * HIDDEN * 1.5,
    )


def test_tensor_ranks_with_sequence_parallelism_gather_and_scatter_as_much():
    found = sent(0, 4, "parallel={tensor: 2, sequence: true}")
    times = 16 * (4 * 12 + 2)
    assert found["tensor", "gathers"] == found["tensor", "reduce-scatters"] == (times, times * HIDDEN / 2)


def test_tensor_ranks_that_recompute_all_sum_forward_twice():
    times, _ = sent(0, 4, "parallel={tensor: 2, recompute: full}")["tensor", "all-reduces"]
    assert times == 16 * (6 * 12 + 2)


def test_tensor_ranks_of_the_longest_stage_are_meant():
    times, _ = sent(0, 8, "parallel={tensor: 2, pipeline: 4}")["tensor", "all-reduces"]
    assert times == 32 * 4 * 4  # four blocks


def test_context_ranks_exchange_twice_a_block_and_as_often_backward():
    found = sent(0, 4, "parallel={context: 4, tensor: 1}", "train.global_batch=128")
    times = (
        16 * 2 * 12
    )  # as tests/distributed/test_context_parallel.py counts them; a quarter of the sequence, of which a quarter stays
    assert found["context", "queries, keys, values"] == (times, times * 3 * HIDDEN / 4 * 3 / 4)
    assert found["context", "attention output"] == (times, times * HIDDEN / 4 * 3 / 4)


def test_tensor_ranks_with_fewer_key_value_heads_gather_the_projection():
    found = sent(0, 4, "parallel.tensor=2", "model.num_kv_heads=1")
    assert found["tensor", "queries, keys, values"] == (16 * 2 * 12, 16 * 2 * 12 * HIDDEN * 14 / 12 / 2)


def test_pipeline_stages_send_hidden_states_ids_and_gradients():
    found = sent(1, 4, "parallel.pipeline=4")
    assert found["pipeline", "hidden states"] == found["pipeline", "their gradients"] == (32, 32 * HIDDEN)
    assert found["pipeline", "position ids"] == (32, 32 * 8 * 1024 * 8)
    assert ("pipeline", "their gradients") not in sent(1, 2, "parallel.pipeline=2")  # no stage has both neighbours


@pytest.mark.parametrize(
    ("zero", "gradients", "weights"),
    [
        (0, ("all-reduced", 1, 2), None),
        (1, ("reduced", 1, 2), 1),  # in fp32
        (2, ("all-reduced", 8, 16), 1),
        (3, ("reduced", 8, 8), 16),
    ],
)
def test_data_ranks_sum_gradients_and_gather_weights_as_zero_does(zero, gradients, weights):
    found = sent(zero, 4)
    full = 2 * PARAMETERS * 3 / 4  # bf16, 4 ranks
    what, times, volumes = gradients
    assert found["data", f"gradients, {what}"] == (times, volumes * full)
    assert found.get(("data", "weights, gathered")) == (weights and (weights, weights * full))


def test_data_ranks_exchange_gradients_in_the_precision_that_is_asked_for():
    times, volume = sent(3, 4)["data", "gradients, reduced"]
    assert sent(3, 4, communication_data_type="fp32")["data", "gradients, reduced"] == (times, 2 * volume)


@pytest.mark.parametrize(
    ("zero", "settings", "options", "reduces"),
    [
        (0, (), {}, False),
        (1, (), {}, True),
        (1, (), {"reduce_scatter": False}, True),  # the bf16 optimizer does not read it
        (1, ("train.precision=fp32",), {}, False),
        (2, (), {}, False),
        (2, (), {"use_multi_rank_bucket_allreduce": False}, True),
        (2, (), {"use_multi_rank_bucket_allreduce": False, "reduce_scatter": False}, False),
        (3, (), {}, True),
        (3, (), {"reduce_scatter": False}, False),
    ],
)
def test_data_ranks_receive_all_sums_or_their_own(zero, settings, options, reduces):
    found = sent(zero, 4, *settings, options=options)
    assert (("data", "gradients, reduced") in found) is reduces
    assert (("data", "gradients, all-reduced") in found) is not reduces


@pytest.mark.parametrize(
    ("zero", "update"), [(0, {"gradients"}), (1, {"gradients", "weights"}), (2, {"weights"}), (3, set())]
)
def test_update_has_what_no_computation_hides(zero, update):
    run = load_run_config(None, [*BF16, "train.global_batch=32"])  # one micro-batch
    found = step_traffic(run, {"zero_optimization": {"stage": zero}}, 4)
    assert {kind.what.split(",")[0] for kind in found if kind.is_update} == update


def test_one_rank_sends_nothing():
    assert sent(2, 1) == {}


def test_bubble_equal_stages_is_the_textbook_share():
    # With a negligible head, 12 blocks are divided evenly.
    run = load_run_config(None, [*BF16, "model.vocab_size=1", "parallel.pipeline=4"])
    assert bubble(run, 4) == pytest.approx(3 / (32 + 3), rel=1e-3)


def test_bubble_unequal_stages_wait_for_the_slowest():
    even, uneven = (
        load_run_config(None, [*BF16, f"model.num_layers={layers}", "model.vocab_size=1", "parallel.pipeline=4"])
        for layers in (12, 13)
    )
    assert bubble(uneven, 4) > bubble(even, 4) + 0.1


def test_bubble_of_one_stage_is_none():
    assert bubble(load_run_config(None, BF16), 4) == 0
