"""The plan of a run and its text: duration, cost, budget, what would fit, the command, the schedule."""

import re

import pytest

from megatron_bipe.config import load_run_config, read_ds_config
from megatron_bipe.errors import ConfigError
from megatron_bipe.estimate.layouts import GIB, Cluster, given_settings, search_layouts
from megatron_bipe.estimate.plan_text import best_command, describe_budget, describe_plan, schedule_plot
from megatron_bipe.estimate.run_plan import Request, gpus_for_budget, plan_run
from megatron_bipe.runtime.gpus import Gpu, named_gpu
from tests.helpers.errors import raises
from tests.helpers.paths import DS_CONFIGS, ROOT

H100, L4 = named_gpu("H100", "--gpu"), named_gpu("L4", "--gpu")
DS_VALUES = {zero: read_ds_config(DS_CONFIGS / f"zero{zero}.json") for zero in range(4)}


def request(name: str, num_gpus: int, *settings: str, gpu: Gpu = H100, margin: float = 0.1) -> Request:
    run = load_run_config(ROOT / "examples" / f"{name}.yaml", ["train.precision=bf16", *settings])
    return Request(run, Cluster(num_gpus, gpu, margin), DS_VALUES, given_settings(settings))


def test_duration_and_price_follow_from_steps_goodput_and_gpus() -> None:
    plan = plan_run(request("bipe_rope_1.6b", 8)._replace(price_per_gpu_hour=2.0))
    assert plan.tokens == 286_102 * 1024 * 1024 and plan.num_parameters == 1_743_882_240
    assert plan.step_hours * 3600 == pytest.approx(286_102 * plan.best.step.total_s)
    assert plan.hours == pytest.approx(plan.step_hours / plan.checkpoints.goodput) and plan.hours > plan.step_hours
    assert plan.gpu_hours == pytest.approx(8 * plan.hours)
    text = describe_plan(plan, "", 1)
    assert f"{plan.gpu_hours:,.0f} GPU-hours x 2 = {2 * plan.gpu_hours:,.0f}" in text
    assert f"{plan.tokens / plan.num_parameters:,.1f} for each of 1,743,882,240 parameters" in text


def test_zero_0_is_not_proposed_because_it_sums_gradients_in_bf16() -> None:
    plan = plan_run(request("bipe_rope_1.6b", 8))
    fastest = plan.search.fitting[0]
    assert fastest.zero == 0 and plan.best.zero > 0 and plan.best.step.total_s >= fastest.step.total_s
    assert plan.best == next(layout for layout in plan.search.fitting if layout.zero > 0)
    assert "sums gradients in bf16" in best_command(plan, [], [])


def test_command_sets_what_differs_from_the_configuration() -> None:
    plan = plan_run(request("bipe_rope_1.6b", 8, "parallel={pipeline: 4, tensor: 2}")._replace(fixed={"tensor": 1}))
    words = best_command(plan, ["--config", "a b.yaml"], ["--dry-run", "8"]).split("\n")[-3]
    assert "--config 'a b.yaml'" in words and "--set parallel.tensor=1 --set parallel.pipeline=1" in words
    assert "micro_batch" not in words  # is 16 already
    tensor = plan_run(request("bipe_rope_1.6b", 8, "parallel.pipeline=1")._replace(fixed={"sequence": True}))
    assert "--set parallel.sequence=true" in best_command(tensor, [], [])


def test_text_counts_all_layouts_and_shows_as_many_as_asked_for() -> None:
    plan = plan_run(request("bipe_rope_1.6b", 8, gpu=H100._replace(memory_gib=24.0)))
    text = describe_plan(plan, "COMMAND\n", 3)
    table = text.split("# Layouts\n")[1].split("\n\n")[0].splitlines()
    assert len(table) == 2 + 3 and table[0].startswith("120 layouts, ")
    counts = re.findall(r"^ +(\d+)  (?:invalid|does not fit)", text, re.MULTILINE)
    assert sum(map(int, counts)) + len(plan.search.fitting) == 120
    assert f"{plan.search.too_large[0].memory_bytes / GIB:.1f} to" in text and "COMMAND" in text


def test_budget_says_how_many_steps_fit_and_how_many_gpus_all_steps_need() -> None:
    plan = plan_run(request("bipe_rope_151m", 8))
    steps = plan.steps_in(plan.hours / 2)
    assert steps == pytest.approx(250_000, abs=1)
    larger = gpus_for_budget(plan, plan.hours / 2)
    assert larger is not None and larger.hours <= plan.hours / 2
    half = plan_run(plan.request.with_gpus(larger.request.cluster.num_gpus // 2))
    assert half.hours > plan.hours / 2
    text = describe_budget(plan, plan.hours / 2, larger)
    assert f"train.steps={steps}" in text and f"{larger.request.cluster.num_gpus} GPUs" in text
    assert gpus_for_budget(plan, plan.hours) is plan
    assert "all 500,000 steps" in describe_budget(plan, 2 * plan.hours, plan)
    assert gpus_for_budget(plan, 0.01) is None and "up to 64 times" in describe_budget(plan, 0.01, None)


def test_branch_is_planned_for_its_own_steps() -> None:
    plan = plan_run(request("bipe_rope_151m", 8, "train.branch_from=runs/trunk@400000"))
    assert plan.tokens == 100_000 * plan.best.run.train.global_batch * plan.best.run.train.seq_len_tokens
    assert plan.step_hours * 3600 == pytest.approx(100_000 * plan.best.step.total_s)
    assert plan.checkpoints.save_every <= 100_000
    text = describe_plan(plan, "", 1)
    assert "steps 400,001 to 500,000, after runs/trunk@400000" in text and "100,000 steps x" in text
    assert f"{5 * plan.tokens / plan.num_parameters:,.1f} for each" in text
    steps = plan.steps_in(plan.hours / 2)
    assert f"train.steps={400_000 + steps}," in describe_budget(plan, plan.hours / 2, None)
    assert "all 100,000 steps" in describe_budget(plan, 2 * plan.hours, plan)


def test_run_that_does_not_fit_says_how_much_it_needs_and_what_would_fit() -> None:
    asked = request("bipe_rope_1.6b", 1, gpu=L4)
    with raises(ConfigError, "29.0 GiB of 19.7", "recompute=full", location="--gpus", remedy="--gpus 2") as caught:
        plan_run(asked)
    named = re.search(r'--gpu "([^"]+)"', caught.value.remedy)
    assert named and plan_run(request("bipe_rope_1.6b", 1, gpu=named_gpu(named[1], ""))).search.fitting
    assert plan_run(asked.with_gpus(2)).search.fitting
    assert "zero2_offload.json" in caught.value.remedy and "--set does not fix" not in caught.value.remedy


def test_run_that_fits_with_a_smaller_margin_says_which() -> None:
    least = search_layouts(*request("bipe_rope_1.6b", 1, gpu=L4)[:2], DS_VALUES, {}).too_large[0].memory_bytes / GIB
    gpu = L4._replace(memory_gib=least * 1.05)
    with raises(ConfigError, "less a margin of 10%", location="--gpus", remedy="--margin") as caught:
        plan_run(request("bipe_rope_1.6b", 1, gpu=gpu))
    named = re.search(r"--margin ([\d.]+)", caught.value.remedy)
    assert named and plan_run(request("bipe_rope_1.6b", 1, gpu=gpu, margin=float(named[1]))).search.fitting


def test_gpus_without_a_valid_layout_are_refused_with_a_number_that_has_one() -> None:
    with raises(ConfigError, "17 GPUs", "global_batch=256", location="--gpus", remedy="Use 16 GPUs"):
        plan_run(request("bipe_rope_151m", 17, gpu=H100._replace(gpus_per_machine=17)))
    with raises(ConfigError, "num_heads=12", location="--gpus", remedy="--set fixes"):
        plan_run(request("bipe_rope_151m", 8, "parallel.tensor=8"))


@pytest.mark.parametrize("settings", [[], ["train.steps=1", "optimizer.warmup_steps=0"], ["train.steps=30"]])
def test_schedule_is_drawn_with_one_star_a_column(settings: list[str]) -> None:
    few = ["optimizer.warmup_steps=10"] if settings == ["train.steps=30"] else []
    run = load_run_config(None, ["train.precision=bf16", *settings, *few])
    lines = schedule_plot(run).splitlines()
    rows = [line.partition("|")[2].ljust(60) for line in lines[:8]]
    columns = min(60, run.train.steps)
    assert [sum(row[column] == "*" for row in rows) for column in range(60)] == [1] * columns + [0] * (60 - columns)
    assert lines[0].startswith(" 1.0e-04 |") and lines[-1].endswith(f"step {run.train.steps:,}")
    if columns > 1:
        assert rows[-1][0] == "*" and "*" in rows[0]  # from 0, with warm-up, to the peak
