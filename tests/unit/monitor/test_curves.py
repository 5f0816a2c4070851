"""Curves of runs: grouping by seed, names, keys, averages and horizontal axes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from megatron_bipe.config import RunConfig
from megatron_bipe.config.load import dump_yaml
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.monitor.curves import draw_curve, group_names, group_seeds, read_runs, select_keys
from tests.helpers.errors import raises
from tests.helpers.tools import assert_refuses, call_tool

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A function that writes the folder of a run with a loss at each step and a validation at the last."""

    def make(name: str, losses: list[float | None], encoding: str = "rope", seed: int = 1, lr: float = 1e-3) -> Path:
        run_dir = tmp_path / name
        run_dir.mkdir(parents=True)
        values: Mapping[str, object] = {
            "run_dir": str(run_dir),
            "model": {"encoding": encoding},
            "optimizer": {"lr": lr},
            "train": {"seed": seed},
        }
        (run_dir / "config.yaml").write_text(dump_yaml(RunConfig.model_validate(values)))
        lines: list[dict[str, object]] = [
            {"step": step, "tokens": 100 * step, "time": 7.0, "loss/train_nats": loss, "time/step_s": 1800.0}
            for step, loss in enumerate(losses, 1)
        ]
        if lines:
            lines.append({"step": len(losses), "time": 8.0, "loss/valid_nats": 2.0 + seed, "by_bin": [1.0, 2.0]})
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run_dir

    return make


def test_runs_that_differ_in_the_seed_alone_are_one_group_with_mean_and_range(make_run: MakeRun) -> None:
    runs = [make_run(f"rope/seed-{seed}", [4.0 + seed, 2.0 + seed], seed=seed) for seed in (1, 2, 3)]
    other = make_run("higher/seed-1", [1.0, 1.0], lr=2e-3)
    groups = group_seeds(read_runs([runs[0], other, *runs[1:], runs[0]]))
    assert [len(group) for group in groups] == [3, 1]
    assert group_names(groups) == ["rope", "higher/seed-1"]
    curve = draw_curve(groups[0], "loss/train_nats", "tokens", smooth=1)
    assert curve is not None
    assert curve.points == [(100.0, 6.0), (200.0, 4.0)]
    assert curve.band == [(100.0, 5.0, 7.0), (200.0, 3.0, 5.0)]
    valid = draw_curve(groups[0], "loss/valid_nats", "step")
    assert valid is not None and valid.points == [(2.0, 4.0)]


def test_runs_with_equal_seeds_are_not_seeds_of_a_group(make_run: MakeRun) -> None:
    assert len(group_seeds(read_runs([make_run("a", [1.0]), make_run("b", [1.0])]))) == 2


def test_names_are_encodings_or_the_parts_of_paths_that_differ(make_run: MakeRun) -> None:
    rope, alibi = make_run("x/rope-model/seed-1", [1.0]), make_run("x/other/seed-1", [1.0], "alibi")
    assert group_names(group_seeds(read_runs([rope, alibi]))) == ["rope", "alibi"]
    again = make_run("x/third/seed-1", [1.0], "alibi", lr=5e-3)
    assert group_names(group_seeds(read_runs([rope, alibi, again]))) == ["rope-model", "other", "third"]


def test_values_of_training_are_averaged_over_neighbours_without_those_that_are_missing(make_run: MakeRun) -> None:
    [history] = read_runs([make_run("a", [1.0, 2.0, None, 4.0, 9.0])])
    curve = draw_curve([history], "loss/train_nats", "hours", smooth=3)
    assert curve is not None and not curve.band
    xs, values = zip(*curve.points, strict=True)
    assert values == pytest.approx((1.5, 1.5, 3.0, 6.5, 6.5))
    assert xs == pytest.approx((0.5, 1.0, 1.5, 2.0, 2.5))


def test_curves_of_long_runs_have_few_points_and_still_count_every_step(make_run: MakeRun) -> None:
    losses: list[float | None] = [1.0] * 9_999
    losses[7_001] = 1001.0
    [history] = read_runs([make_run("a", losses)])
    curve = draw_curve([history], "loss/train_nats", "step", smooth=1)
    assert curve is not None and len(curve.points) == 2000
    assert max(np.array(curve.points)[:, 1]) > 100


def test_keys_are_the_losses_or_those_of_the_patterns(make_run: MakeRun) -> None:
    histories = read_runs([make_run("a", [1.0])])
    assert select_keys(histories, []) == ["loss/train_nats", "loss/valid_nats"]
    assert select_keys(histories, ["time/*", "loss/v*"]) == ["time/step_s", "loss/valid_nats"]
    with raises(ConfigError, "loss/trian_nats", location="--keys", remedy="loss/train_nats"):
        select_keys(histories, ["loss/trian_nats"])
    with raises(ConfigError, "by_bin", location="--keys"):
        select_keys(histories, ["by_bin"])


def test_command_draws_the_format_of_the_suffix_and_refuses_bad_input(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(f"rope/seed-{seed}", [5.0, 4.0, 3.0], seed=seed) for seed in (1, 2)]
    runs.append(make_run("bipe_rope/seed-1", [5.0, 3.0, 2.0], "bipe_rope"))
    svg = tmp_path / "loss.svg"
    call_tool("plot", *runs, "--output", svg, "--title", "a $b$ 50%")
    text = svg.read_text()
    for shown in ("rope (2 seeds)", "bipe_rope", "shaded: range of seeds", "a $b$ 50%", "loss, nats per token"):
        assert f">{shown}</text>" in text
    before = svg.read_bytes()
    for arguments, kind, observed in (
        ([*runs, "--output", svg], Exception, "--overwrite"),
        ([*runs, "--output", tmp_path / "loss.gif"], ConfigError, "gif"),
        ([*runs, "--output", tmp_path / "a.pdf", "--smooth", 0], ConfigError, 0),
        ([make_run("empty", []), "--output", tmp_path / "a.pdf"], CheckpointError, "step"),
        ([tmp_path / "none", "--output", tmp_path / "a.pdf"], CheckpointError, "none"),
    ):
        if kind is Exception:
            assert observed in call_tool("plot", *arguments, code=2).output
        else:
            assert_refuses("plot", arguments, kind, observed)
    assert svg.read_bytes() == before and not (tmp_path / "a.pdf").exists()
    call_tool("plot", *runs, "--output", tmp_path / "b.png", "--keys", "loss/*,time/step_s", "--x", "hours")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
