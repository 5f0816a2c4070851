"""Predicted time of a step, against times that were worked out by hand."""

import pytest

from megatron_bipe.config import accumulation_steps
from megatron_bipe.config.deepspeed import engine_config, read_ds_config
from megatron_bipe.config.load import load_run_config
from megatron_bipe.errors import ConfigError
from megatron_bipe.estimate.communication import step_traffic
from megatron_bipe.estimate.step_time import COMPILED, EAGER, Costs, StepTime, costs_of, measured_slowdown, predict_step
from megatron_bipe.model import train_flops_per_token
from megatron_bipe.runtime.gpus import Gpu, named_gpu
from tests.helpers.errors import raises
from tests.helpers.paths import DS_CONFIGS, ROOT

H100, H200 = (named_gpu(name, "--gpu") for name in ("H100", "H200"))
# Costs of revision ffd142e: three views of a fused projection, gradient sums of DeepSpeed, a synchronization for each
# micro-batch; two outputs of SwiGLU were counted twice.
BEFORE = Costs(hidden_moves=95.6, ffn_moves=20, logit_bytes=64, sum_bytes=18, waits=1, host_block_s=0.0)


def settings(name, *more, zero=1, num_ranks=1, **zero_options):
    path = ROOT / "examples" / f"{name}.yaml"
    run = load_run_config(path, ["train.precision=bf16", *more])
    values = read_ds_config(DS_CONFIGS / f"zero{zero}.json")
    values["zero_optimization"] |= zero_options
    return run, engine_config(run, values, num_ranks, ""), num_ranks


def predicted(name, *more, gpu: Gpu = H100, costs: Costs | None = None, **options) -> StepTime:
    return predict_step(*settings(name, *more, **options), gpu, costs)


def of_micro_batch(name, *more, **options) -> dict[str, float]:
    """Return milliseconds of a micro-batch by part, those of the update spread over all micro-batches."""
    run, _, num_ranks = settings(name, *more, **{key: options[key] for key in options.keys() & {"num_ranks"}})
    step = predicted(name, *more, **options)
    micro_batches = accumulation_steps(run.train, run.parallel.data_ranks(num_ranks))
    parts = zip(StepTime._fields, step, strict=True)
    milliseconds = {name: 1000 * value / micro_batches for name, value in parts if name.endswith("_s")}
    return milliseconds | {"total": 1000 * step.total_s / micro_batches, "mfu": step.mfu}


@pytest.mark.parametrize(
    ("name", "products", "attention", "elementwise", "loss", "sums", "total", "mfu"),
    [
        ("bipe_rope_151m", 14.0, 2.3, 9.1, 5.7, 0.9, 31.5, 0.23),
        ("bipe_rope_1.6b", 123, 7.7, 48.7, 5.7, 10.8, 197, 0.43),
    ],
)
def test_eager_micro_batch_before_optimization_takes_what_was_worked_out(
    name, products, attention, elementwise, loss, sums, total, mfu
):
    found = of_micro_batch(name, "train.micro_batch=8", costs=BEFORE)
    assert found["products_s"] == pytest.approx(products, rel=0.02)
    assert found["attention_s"] == pytest.approx(attention, rel=0.03)
    assert found["elementwise_s"] == pytest.approx(elementwise, rel=0.02)
    assert found["loss_s"] == pytest.approx(loss, rel=0.03)
    assert found["gradient_sums_s"] == pytest.approx(sums, rel=0.15)
    assert found["total"] == pytest.approx(total, rel=0.1) and found["mfu"] == pytest.approx(mfu, rel=0.1)


@pytest.mark.parametrize(("name", "mfu"), [("bipe_rope_151m", 0.26), ("bipe_rope_1.6b", 0.48)])
def test_more_memory_bandwidth_helps_what_moves_bytes(name, mfu):
    assert predicted(name, gpu=H200, costs=BEFORE).mfu == pytest.approx(mfu, rel=0.05)


@pytest.mark.parametrize(("name", "mfu"), [("bipe_rope_151m", 0.37), ("bipe_rope_1.6b", 0.56)])
def test_compiled_micro_batch_of_16_reaches_the_utilization_that_was_worked_out(name, mfu):
    assert predicted(name, "train.micro_batch=16").mfu == pytest.approx(mfu, rel=0.1)


def test_compilation_follows_the_run_and_zero_3_is_eager():
    eager, compiled = (
        predicted("bipe_rope_1.6b", f"train.compile={choice}").elementwise_s for choice in ("off", "auto")
    )
    moves = [(4 * costs.ffn_moves + costs.hidden_moves) for costs in (EAGER, COMPILED)]
    assert eager / compiled == pytest.approx(moves[0] / moves[1])
    assert predicted("bipe_rope_1.6b", zero=3).elementwise_s == eager
    loss_s = predicted("bipe_rope_1.6b").loss_s
    assert predicted("bipe_rope_1.6b", "train.compile=off").loss_s == pytest.approx(loss_s * 64 / 6)
    sharded_s = predicted("bipe_rope_1.6b", "parallel.tensor=2", num_ranks=2).loss_s
    assert sharded_s == pytest.approx(loss_s * 8 / 6 / 2)  # half of the vocabulary


def test_rates_are_those_of_all_ranks():
    run, ds_config, num_ranks = settings("bipe_rope_1.6b", num_ranks=8)
    step = predict_step(run, ds_config, num_ranks, H100)
    assert step.tokens_per_second * step.total_s == pytest.approx(1024 * 1024)
    flops = train_flops_per_token(run.model, 1024) * step.tokens_per_second
    assert step.mfu == pytest.approx(flops / (8 * 989e12))
    assert step.total_s == pytest.approx(sum(step[: StepTime._fields.index("tokens_per_second")]))


def test_small_models_wait_for_the_host_that_launches_with_zero_3():
    waits = {zero: predicted("bipe_rope_151m", zero=zero).waits_s for zero in (1, 3)}
    run, *_ = settings("bipe_rope_151m")
    assert waits[1] == pytest.approx(1.3e-3)  # of the update
    assert waits[3] / accumulation_steps(run.train, 1) > 10e-3
    assert predicted("bipe_rope_1.6b", zero=3).waits_s == pytest.approx(65 * 1.3e-3)  # each micro-batch of 16, update


def test_more_than_128_channels_of_heads_are_slower():
    times = {encoding: predicted(f"bipe_{encoding}_1.6b").attention_s for encoding in ("rope", "alibi")}
    assert times["alibi"] == pytest.approx(times["rope"] * (128 + 16) / 128 * 0.325 / 0.225)


def test_recomputation_repeats_forward():
    none, selective, full = (
        predicted("bipe_rope_1.6b", f"parallel.recompute={choice}") for choice in ("none", "selective", "full")
    )
    assert none.products_s == selective.products_s == pytest.approx(full.products_s * 3 / 4)
    assert none.elementwise_s < selective.elementwise_s == full.elementwise_s


def test_update_of_zero_1_exchanges_by_nvlink_in_a_machine_and_by_all_adapters_between_them():
    for num_ranks, gpu, bandwidth in (
        (8, H100, 450e9),
        (64, H100, 8 * 50e9),
        (64, H100._replace(network_bytes_s=12.5e9), 8 * 12.5e9),
        (64, H100._replace(link_bytes_s=64e9), 64e9),
    ):
        run, ds_config, _ = settings("bipe_rope_1.6b", num_ranks=num_ranks)
        step = predict_step(run, ds_config, num_ranks, gpu)
        sent = sum(kind.bytes_sent for kind in step_traffic(run, ds_config, num_ranks))
        assert step.update_communication_s == pytest.approx(sent / (0.8 * bandwidth))
        assert step.micro_batch_communication_s == 0


def test_replicas_of_tensor_parallel_machines_have_one_adapter_each():
    run, ds_config, _ = settings("bipe_rope_1.6b", "parallel.tensor=8", num_ranks=64)
    step = predict_step(run, ds_config, 64, H100)
    seconds = dict.fromkeys(("tensor", "data"), 0.0)
    for kind in step_traffic(run, ds_config, 64):
        seconds[kind.axis] += kind.bytes_sent / (0.8 * {"tensor": 450e9, "data": 50e9}[kind.axis])
    assert step.update_communication_s == pytest.approx(seconds["data"])
    assert step.micro_batch_communication_s == pytest.approx(seconds["tensor"])


def test_links_of_machines_with_other_numbers_of_gpus():
    def exchanged_s(num_ranks, gpu, *settings):
        step = predict_step(*settings_of(num_ranks, *settings), gpu)
        return step.micro_batch_communication_s + step.update_communication_s

    def settings_of(num_ranks, *more):
        return settings("bipe_rope_1.6b", *more, num_ranks=num_ranks)

    in_8, in_4 = H100, H100._replace(gpus_per_machine=4)
    assert exchanged_s(8, in_4) == pytest.approx(exchanged_s(8, in_8) * 450 / (4 * 50))
    for axis, adapters in (("tensor", 4), ("context", 1)):  # a ring, and all-to-alls
        axis_only = settings_of(8, f"parallel.{axis}=8", "train.micro_batch=128")
        sent = sum(kind.bytes_sent for kind in step_traffic(*axis_only) if kind.axis == axis)
        slower_s = (
            predict_step(*axis_only, in_4).micro_batch_communication_s
            - predict_step(*axis_only, in_8).micro_batch_communication_s
        )
        assert slower_s == pytest.approx(sent / 0.8 * (1 / (adapters * 50e9) - 1 / 450e9))
    straddling = settings_of(24, "parallel.tensor=3", "model.num_heads=24", "model.hidden_size=1536")
    assert predict_step(*straddling, in_8).micro_batch_communication_s > (
        predict_step(*straddling, H100._replace(gpus_per_machine=24)).micro_batch_communication_s
    )


def test_measured_utilization_scales_micro_batches_alone():
    run, ds_config, _ = settings("bipe_rope_1.6b", num_ranks=8)
    slowdown = measured_slowdown(run, H100, 0.28)
    before = predict_step(run, ds_config, 8, H100)
    after = predict_step(run, ds_config, 8, H100, costs_of(run, ds_config)._replace(slowdown=slowdown))
    assert after.products_s == pytest.approx(before.products_s * slowdown)
    assert after.update_s == before.update_s and after.update_communication_s == before.update_communication_s
    computing_s = after.total_s - after.update_s - after.update_communication_s - 1.3e-3
    flops = 1024 * 1024 * train_flops_per_token(run.model, 1024)
    assert flops / (computing_s * 8 * 989e12) == pytest.approx(0.28)


def test_zero_2_hides_what_backward_has_time_for_also_with_one_micro_batch():
    hidden = predicted("bipe_rope_1.6b", zero=2, num_ranks=64)
    exposed = predicted("bipe_rope_1.6b", zero=2, num_ranks=64, overlap_comm=False)
    assert hidden.micro_batch_communication_s == 0 < exposed.micro_batch_communication_s
    assert hidden.update_communication_s == exposed.update_communication_s > 0  # the weights are gathered


def test_pipeline_waits_for_its_ends():
    run, ds_config, num_ranks = settings("bipe_rope_1.6b", "parallel.pipeline=4", num_ranks=4)
    step = predict_step(run, ds_config, num_ranks, H100)
    micro_batches = accumulation_steps(run.train, 1)
    assert step.bubble_s * micro_batches == pytest.approx(
        3 * (step.total_s - step.bubble_s - step.update_s - step.update_communication_s - 1.3e-3)
    )
    assert step.micro_batch_communication_s > 0
    assert step.products_s > predicted("bipe_rope_1.6b").products_s / 4  # of the most expensive stage


def test_other_precisions_are_refused():
    run = load_run_config(None, ["train.precision=fp32"])
    with raises(ConfigError, "fp32", location="train.precision"):
        predict_step(run, {}, 1, H100)
