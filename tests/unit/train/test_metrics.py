"""metrics.jsonl: every step once, also over a restart."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bipe.config.load import load_run_config
from megatron_bipe.engine.api import StepResult
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.train.metrics import Metrics

MAIN = Mesh(0, 0, 1, 1, torch.device("cpu"))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return load_run_config(None, [f"run_dir={tmp_path / 'run'}", "train.log_every=2", "train.steps=6"])


def _lines(run):
    return [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]


def _do(run, steps, start=0, mesh=MAIN):
    metrics = Metrics(run, mesh, start, peak_flops=1e12)
    for step in steps:
        metrics.step(step, StepResult(torch.tensor(float(step)), 0.5), lr=1e-4)
    return metrics


def test_metrics_every_step_has_one_line_with_units(run):
    metrics = _do(run, [1, 2, 3])
    metrics.valid(3, 2.0)
    metrics.close()
    lines = _lines(run)
    assert [(line["step"], line.get("loss/train_nats")) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0), (3, None)]
    assert lines[0]["tokens"] == run.train.global_batch * run.train.seq_len_tokens
    assert {"optim/lr", "optim/grad_norm", "time/step_s", "rate/tokens_per_s", "mem/peak_gib", "util/mfu"} <= set(
        lines[0]
    )
    assert lines[3]["valid/perplexity"] == pytest.approx(7.389, abs=1e-3)


def test_metrics_restart_drops_lines_that_will_be_written_again(run):
    _do(run, [1, 2, 3, 4]).close()
    with (run.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tok')  # cut off by a crash
    _do(run, [3, 4], start=2).close()
    assert [line["step"] for line in _lines(run)] == [1, 2, 3, 4]


def test_metrics_reach_tensorboard(run):
    _do(run, [1, 2]).close()
    board = EventAccumulator(str(run.run_dir / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("loss/train_nats")] == [1.0, 2.0]


def test_metrics_other_ranks_write_nothing(run):
    _do(run, [1, 2], mesh=MAIN._replace(rank=1)).close()
    assert not (run.run_dir / "metrics.jsonl").exists()
