"""The search of layouts: what is tried, refused, too large, and in which order."""

from typing import Any

import pytest

from megatron_bipe.config import RunConfig, engine_config, load_run_config, read_ds_config, validate_run
from megatron_bipe.errors import ConfigError
from megatron_bipe.estimate.layouts import (
    GIB,
    Cluster,
    Layout,
    Search,
    chosen_settings,
    given_settings,
    search_layouts,
    with_settings,
)
from megatron_bipe.estimate.memory import stage_memories
from megatron_bipe.estimate.step_time import predict_step
from megatron_bipe.runtime.gpus import Gpu, named_gpu
from tests.helpers.errors import raises
from tests.helpers.paths import DS_CONFIGS, ROOT

H100, L4 = named_gpu("H100", "--gpu"), named_gpu("L4", "--gpu")
DS_VALUES = {zero: read_ds_config(DS_CONFIGS / f"zero{zero}.json") for zero in range(4)}


def configured(name: str, *settings: str) -> RunConfig:
    return load_run_config(ROOT / "examples" / f"{name}.yaml", ["train.precision=bf16", *settings])


def searched(
    name: str, num_gpus: int, *settings: str, gpu: Gpu = H100, margin: float = 0.1, mfu: float | None = None
) -> Search:
    cluster = Cluster(num_gpus, gpu, margin, mfu)
    return search_layouts(configured(name, *settings), cluster, DS_VALUES, given_settings(settings))


def axes(layout: Layout) -> tuple[int, int, int]:
    parallel = layout.run.parallel
    return parallel.tensor, parallel.context, parallel.pipeline


@pytest.mark.parametrize("num_gpus", [8, 64])
def test_every_layout_is_counted_once_and_those_that_fit_are_sorted_by_time(num_gpus: int) -> None:
    search = searched("bipe_rope_1.6b", num_gpus)
    power = num_gpus.bit_length() - 1
    divisions = [(t, c, p) for t in range(power + 1) for c in range(power + 1 - t) for p in range(power + 1 - t - c)]
    assert search.num_layouts == 4 * sum(2 if tensor else 1 for tensor, _, _ in divisions)
    times = [layout.step.total_s for layout in search.fitting]
    assert times == sorted(times) and len({(*chosen_settings(x.run).values(), x.zero) for x in search.fitting}) == len(
        times
    )
    assert search.invalid["parallel.pipeline with zero_optimization.stage: the pipeline engine cannot shard gradients"]
    assert not any(layout.zero > 1 for layout in search.fitting if layout.run.parallel.pipeline > 1)


def test_figures_of_layouts_are_those_of_a_dry_run() -> None:
    search = searched("bipe_rope_1.6b", 16)
    for layout in [*search.fitting[:3], *search.fitting[-3:]]:
        validate_run(layout.run, 16)
        ds_config = engine_config(layout.run, DS_VALUES[layout.zero], 16, "")
        assert predict_step(layout.run, ds_config, 16, H100) == layout.step
        memories = stage_memories(layout.run, ds_config, 16, on_gpu=True)
        assert max(stage.device for stage in memories) == layout.memory_bytes <= 0.9 * H100.memory_gib * GIB


@pytest.mark.parametrize(("name", "num_gpus"), [("bipe_rope_151m", 8), ("bipe_rope_151m", 64), ("bipe_rope_1.6b", 64)])
def test_models_that_fit_one_gpu_are_fastest_with_data_parallelism_alone(name: str, num_gpus: int) -> None:
    best = searched(name, num_gpus).fitting[0]
    assert axes(best) == (1, 1, 1) and best.run.parallel.recompute == "none"


def test_layouts_that_are_too_large_are_those_above_the_margin() -> None:
    half = searched("bipe_rope_1.6b", 8, gpu=H100._replace(memory_gib=24.0))
    assert half.too_large and half.fitting
    assert all(layout.memory_bytes > 0.9 * 24 * GIB for layout in half.too_large)
    assert [x.memory_bytes for x in half.too_large] == sorted(x.memory_bytes for x in half.too_large)
    assert all(layout.run.parallel.recompute == "full" for layout in half.too_large)  # the least that they need
    tight = searched("bipe_rope_1.6b", 8, gpu=H100._replace(memory_gib=24.0), margin=0.3)
    assert len(tight.too_large) > len(half.too_large) and tight.num_layouts == half.num_layouts


def test_the_fastest_setting_of_a_layout_is_found_as_by_trying_all() -> None:
    gpu, run = H100._replace(memory_gib=30.0), configured("bipe_rope_1.6b", "train.global_batch=64")
    search = search_layouts(run, Cluster(4, gpu), {1: DS_VALUES[1]}, {})
    for layout in search.fitting:
        data_ranks = layout.run.parallel.data_ranks(4)
        tried = []
        for recompute in ("none", "selective", "full"):
            for micro_batch in (1, 2, 4, 8, 16, 32, 64):
                if 64 // data_ranks % micro_batch == 0:
                    parallel = layout.run.parallel.model_copy(update={"recompute": recompute})
                    other = with_settings(run, parallel.model_dump() | {"micro_batch": micro_batch})
                    ds_config = engine_config(other, DS_VALUES[1], 4, "")
                    needed = max(stage.device for stage in stage_memories(other, ds_config, 4, on_gpu=True))
                    if needed <= 0.9 * 30 * GIB:
                        tried.append(predict_step(other, ds_config, 4, gpu).total_s)
        assert layout.step.total_s == pytest.approx(min(tried))


def test_settings_that_are_given_are_not_varied() -> None:
    given = ["parallel.tensor=2", "parallel.recompute=full", "train.micro_batch=4"]
    search = searched("bipe_rope_1.6b", 8, *given)
    assert given_settings(given) == {"tensor": 2, "recompute": "full", "micro_batch": 4}
    assert search.fitting and {layout.run.parallel.tensor for layout in search.fitting} == {2}
    assert {(x.run.parallel.recompute, x.run.train.micro_batch) for x in search.fitting} == {("full", 4)}
    assert given_settings(["train.steps=5", "model.num_layers=2"]) == {}


def test_own_layout_of_a_configuration_does_not_matter() -> None:
    run = configured("bipe_rope_1.6b", "parallel={tensor: 4, sequence: true, timeout_s: 7}", "train.micro_batch=2")
    search = search_layouts(run, Cluster(8, H100), DS_VALUES, {})
    assert [layout.step for layout in search.fitting] == [x.step for x in searched("bipe_rope_1.6b", 8).fitting]
    assert {layout.run.parallel.timeout_s for layout in search.fitting} == {7}


@pytest.mark.parametrize(
    ("settings", "num_gpus", "rule"),
    [
        ([], 128, "model.num_heads=12 is not a multiple of parallel.tensor x parallel.context"),
        ([], 128, "parallel.pipeline exceeds 13"),
        (
            ["train.global_batch=6"],
            8,
            "train.global_batch=6 is not a multiple of train.micro_batch x data-parallel ranks",
        ),
        (
            ["model.num_kv_heads=3"],
            2,
            "model.num_kv_heads=3 is neither a multiple nor a divisor of parallel.tensor x parallel.context",
        ),
    ],
)
def test_rules_are_counted_without_the_numbers_of_the_layout(settings: list[str], num_gpus: int, rule: str) -> None:
    assert searched("bipe_rope_151m", num_gpus, *settings).invalid[rule] > 0


def test_measured_utilization_changes_times_and_not_memory() -> None:
    predicted, measured = searched("bipe_rope_151m", 8), searched("bipe_rope_151m", 8, mfu=0.1)
    assert measured.fitting[0].step.mfu == pytest.approx(0.1, rel=0.02) and predicted.fitting[0].step.mfu > 0.2
    assert measured.fitting[0].memory_bytes == predicted.fitting[0].memory_bytes


def test_what_cannot_be_predicted_is_refused() -> None:
    with raises(ConfigError, "fp32", location="train.precision", remedy="bf16"):
        searched("bipe_rope_151m", 8, "train.precision=fp32")
    with raises(ConfigError, "t5", location="--mfu"):
        searched("bipe_rope_151m", 8, "model.encoding=t5")
    assert searched("bipe_rope_151m", 8, "model.encoding=t5", mfu=0.2).fitting
    disagreeing: dict[int, dict[str, Any]] = {1: DS_VALUES[1] | {"gradient_clipping": 7.0}}
    with raises(ConfigError, "gradient_clipping", location="ds_configs/zero1.json"):
        search_layouts(configured("bipe_rope_151m"), Cluster(8, H100), disagreeing, {})
