"""tools/plan.py: its command passes a dry run with the same figures; options, JSON, comparison, bad input."""

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_bipe.config import dump_yaml, load_run_config
from megatron_bipe.errors import CheckpointError, ConfigError, DataError
from tests.helpers.paths import ROOT
from tests.helpers.tools import assert_refuses, call_tool, run_pretrain

RECIPE = ["--config", "examples/bipe_rope_1.6b.yaml", "--gpu", "h100"]


def test_plan_command_passes_a_dry_run_with_the_same_figures(tmp_path: Path, write_dataset) -> None:  # type: ignore[no-untyped-def]
    write_dataset(tmp_path / "data", [[[1] * 5000] * 4])
    settings = [f"data.path={tmp_path / 'data'}", "data.valid_path=null", f"run_dir={tmp_path / 'run'}"]
    options = [*RECIPE, *(word for item in settings for word in ("--set", item)), "--gpus", 16, "--gpus-per-node", 4]
    file = tmp_path / "plan.json"
    text = call_tool("plan", *options, "--network", 100, "--json", file).output
    values, best = json.loads(file.read_text()), json.loads(file.read_text())["best"]
    line = next(line for line in text.splitlines() if line.startswith("deepspeed pretrain.py"))
    check = next(line for line in text.splitlines() if line.startswith("To check it")).partition(": ")[2]
    (ended,) = run_pretrain([*shlex.split(line)[2:], *shlex.split(check)], tmp_path, code=None)
    assert f"ZeRO {best['zero']}\n" in ended.output and "16 ranks = " in ended.output, ended.output
    assert f"fits: {best['memory_bytes'] / 2**30:.1f} of 79.1 GiB" in ended.output
    assert f"{best['step']['tokens_per_second']:,.0f} tokens/s, {best['step']['mfu']:.0%} MFU" in ended.output
    assert re.search(rf"total +{1000 * best['step_s']:.1f}\n", ended.output)
    assert f"{values['checkpoints']['num_bytes'] / 1e9:,.1f} GB each" in ended.output
    epochs = re.findall(r"the run reads it [\d.]+ times", text)
    assert epochs and epochs[0] in ended.output


def test_plan_page_shows_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "planning.md").read_text("utf-8")
    command = next(line for line in page.splitlines() if line.startswith("    python tools/plan.py --config"))
    shown = page.split(command)[1].split("\n**Nothing")[0]
    printed = call_tool("plan", *shlex.split(command)[2:]).output
    assert [line.strip() for line in shown.split("\n") if line] == [x.strip() for x in printed.split("\n") if x]


def test_plan_options_reach_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    options = [*RECIPE, "--gpus", 8, "--price-per-gpu-hour", 3, "--budget-hours", 1, "--mfu", 0.3, "--margin", 0.5]
    text = call_tool("plan", *options, "--node-mtbf-hours", 20, "--write-gb-s", 1, "--top", 2, "--json", file).output
    values = json.loads(file.read_text())
    assert values["memory_limit_bytes"] == pytest.approx(0.5 * 79.1 * 2**30)
    assert values["price"] == pytest.approx(3 * values["gpu_hours"]) and values["best"]["step"]["mfu"] < 0.3
    assert values["checkpoints"]["mtbf_s"] == 20 * 3600 and values["checkpoints"]["write_s"] == pytest.approx(
        20.9, abs=0.1
    )
    assert values["budget"]["steps"] > 0 and "# Budget\n1 hours: " in text
    assert text.split("accumulated")[1].count("\n     1 ") == 2
    with_file = [*RECIPE, "--gpus", 8, "--json", file]
    assert_refuses("plan", with_file, DataError, "exists", location=file)


@pytest.mark.parametrize(
    ("options", "observed", "location"),
    [
        (["--gpus", 8, "--gpu", "h1000"], "h1000", "--gpu"),
        (["--gpus", 12, "--gpu", "h100"], "8 or 16", "--gpus"),
        (["--gpus", 12, "--gpu", "h100", "--gpus-per-node", 5], "10 or 15", "--gpus"),
        (["--gpus", 0, "--gpu", "h100"], "0", "--gpus"),
        (["--gpus", 8, "--gpu", "h100", "--margin", 1], "less than 1", "--margin"),
        (["--gpus", 8, "--gpu", "h100", "--mfu", "nan"], "nan", "--mfu"),
        (["--gpus", 8, "--gpu", "h100", "--network", -1], "-1", "--network"),
        (["--gpu", "h100"], "--help", "--gpus"),
        (["--gpus", 8], "--help", "--gpu"),
        (["--gpus", 8, "--gpu", "h100", "--set", "model.num_heads=7"], "768", "--set model.num_heads=7"),
        (["--gpus", 8, "--gpu", "h100", "--set", "model.layers=7"], "num_layers", "--set model.layers=7"),
        (["--gpus", 8, "--gpu", "h100", "--config", "absent.yaml"], "no such", "absent.yaml"),
        (["--compare", "x", "--gpu", "h100", "--gpus", 8], "Remove", "--compare"),
    ],
)
def test_plan_refuses_bad_input(options: list[object], observed: str, location: str) -> None:
    assert_refuses("plan", options, ConfigError, observed, location=location)


def recorded(folder: Path, *settings: str, steps: int = 4) -> Path:
    run = load_run_config(ROOT / "examples" / "bipe_rope_1.6b.yaml", ["train.precision=bf16", *settings])
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(run))
    lines = [
        {"step": step, "time": step, "time/step_s": 3.0, "rate/tokens_per_s": 1e6 / 3, "mem/peak_gib": 40.0 + step}
        for step in range(1, steps + 1)
    ]
    events = [
        {"time": 0, "event": "start", "step": 0, "ranks": 8},
        {"time": 1, "event": "saved", "step": 2, "bytes": 41_853_173_760, "seconds": 8.0},
    ]
    for name, values in (("metrics", lines), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in values))
    return folder


def test_compare_shows_planned_measured_and_their_ratio(tmp_path: Path) -> None:
    file, run_dir = tmp_path / "compare.json", recorded(tmp_path / "run")
    options = ["--compare", run_dir, "--gpu", "h100", "--ds_config", "ds_configs/zero1.json", "--json", file]
    text = call_tool("plan", *options, "--write-gb-s", 2).output
    found = json.loads(file.read_text())
    assert found["s per step"]["measured"] == 3.0 and 2 < found["s per step"]["planned"] < 3
    for row in found.values():
        assert row["ratio"] == pytest.approx(row["measured"] / row["planned"]), row
    assert found["peak GiB, allocated"]["measured"] == 44.0
    assert found["checkpoint, GB"]["ratio"] == pytest.approx(2) and found["checkpoint, s"]["planned"] == pytest.approx(
        10.46, abs=0.01
    )
    assert found["MFU"]["ratio"] == pytest.approx(found["tokens/s"]["ratio"])
    assert "4 steps, 8 ranks, ZeRO 1" in text and f"{found['MFU']['ratio']:.4g}" in text


def test_compare_uses_the_deepspeed_settings_that_the_last_start_recorded(tmp_path: Path) -> None:
    run_dir = recorded(tmp_path / "run")
    settings = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    start = {"time": 2, "event": "start", "step": 2, "ranks": 8, "deepspeed": {"file": "x.json", "settings": settings}}
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")
    options = ["--compare", run_dir, "--gpu", "h100"]
    assert "8 ranks, ZeRO 2" in call_tool("plan", *options).output
    assert "8 ranks, ZeRO 1" in call_tool("plan", *options, "--ds_config", "ds_configs/zero1.json").output


def test_compare_leaves_out_what_is_not_predicted(tmp_path: Path) -> None:
    run_dir = recorded(tmp_path / "run", "train.precision=fp32", "train.micro_batch=1")
    file = tmp_path / "compare.json"
    call_tool("plan", "--compare", run_dir, "--gpu", "h100", "--ds_config", "ds_configs/zero1.json", "--json", file)
    found = json.loads(file.read_text())
    assert found["s per step"] == {"figure": "s per step", "planned": None, "measured": 3.0, "ratio": None}
    assert found["peak GiB, allocated"]["ratio"] is not None


def test_compare_refuses_folders_that_have_no_answer(tmp_path: Path) -> None:
    options = ["--compare", tmp_path / "absent", "--gpu", "h100"]
    assert_refuses("plan", options, CheckpointError, "absent", location=tmp_path / "absent")
    run_dir = recorded(tmp_path / "run")
    assert_refuses("plan", ["--compare", run_dir, "--gpu", "h100"], ConfigError, "--ds_config", location=run_dir)
    empty = recorded(tmp_path / "empty", steps=0)
    assert_refuses("plan", ["--compare", empty, "--gpu", "h100"], CheckpointError, "0 recorded steps", location=empty)
