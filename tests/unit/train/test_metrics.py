"""metrics.jsonl and TensorBoard have every step once, also after a kill at any moment and a restart."""

import json
import math
import os
import resource
from contextlib import contextmanager

import orjson
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bipe.config.load import load_run_config
from megatron_bipe.engine.interface import StepResult
from megatron_bipe.model.transformer import train_flops_per_token
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.train.metrics import Metrics
from megatron_bipe.train.metrics_file import MetricsFile
from megatron_bipe.train.train_state import TrainState
from megatron_bipe.train.validation import ValidResult
from tests.helpers.errors import assert_warned

MAIN = Mesh(0, 0, 1, 1, torch.device("cpu"))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return load_run_config(None, [f"run_dir={tmp_path / 'run'}", "train.steps=6"])


def _lines(run):
    return [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]


def _scalars(run, tag):
    board = EventAccumulator(str(run.run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)] if tag in board.Tags()["scalars"] else []


def _do(run, steps, start=0, mesh=MAIN, valid_owed=False, began_at_s=None):
    metrics = Metrics(run, mesh, TrainState(step=start, valid_owed=valid_owed), 1e12, began_at_s)
    for step in steps:
        metrics.step(step, (8 * step - 8, 8 * step), StepResult(torch.tensor(float(step)), 0.5), lr=1e-4)
    metrics.flush()
    return metrics


def _result(name="valid", length_tokens=1024, nats=2.0, bits_per_byte=0.75, by_position=None):
    return ValidResult(name, length_tokens, nats, by_position or [nats] * 16, bits_per_byte)


def test_metrics_every_step_has_one_line_with_units(run):
    metrics = _do(run, [1, 2, 3])
    metrics.valid(3, [_result()])
    metrics.close()
    lines = _lines(run)
    assert [(line["step"], line.get("loss/train_nats")) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0), (3, None)]
    assert lines[0]["tokens"] == run.train.global_batch * run.train.seq_len_tokens
    assert lines[1]["data/samples"] == 16
    keys = {"optim/lr", "optim/grad_norm", "time/step_s", "rate/tokens_per_s", "mem/peak_gib", "util/mfu"}
    assert keys | {"run/goodput"} <= set(lines[0])
    assert lines[3]["valid/perplexity"] == pytest.approx(7.389, abs=1e-3)


def test_metrics_of_a_validation_are_one_line_with_all_sets_and_lengths(run, caplog):
    by_position = [float(part) for part in range(15)] + [math.nan]
    results = [
        *(_result("a", length, nats, by_position=by_position) for length, nats in ((256, 3.0), (1024, 2.0))),
        *(_result("b", length, 5.0, None) for length in (256, 1024)),
    ]
    metrics = _do(run, [1])
    with caplog.at_level("INFO"):
        metrics.valid(1, results)
    metrics.close()
    *_, line = _lines(run)
    assert line["loss/valid_nats"] == 2.0 and line["valid/perplexity"] == math.exp(2.0)  # at the training length
    for each in results:
        key = f"valid/{each.name}/{each.length_tokens}"
        assert (line[f"{key}/nats"], line[f"{key}/perplexity"]) == (each.nats, math.exp(each.nats))
        assert line.get(f"{key}/bits_per_byte") == each.bits_per_byte
    assert line["valid/a/256/nats_by_position"] == [*by_position[:15], None]
    assert "valid/b/256/bits_per_byte" not in line and len(_lines(run)) == 2
    for part in range(15):
        assert _scalars(run, f"valid/a/256/nats_by_position/{part:02}") == [(1, part)]
    assert _scalars(run, "valid/a/256/nats") == [(1, 3.0)] and _scalars(run, "valid/a/256/nats_by_position") == []
    [message] = [message for message in caplog.messages if "validation" in message]
    assert "2.0000" in message and "7.39" in message and "20.09 at 256" in message and "148.41" not in message


def test_metrics_of_a_validation_are_shown_again_after_a_restart(run):
    metrics = _do(run, [1])
    metrics.valid(1, [_result(by_position=[1.0] * 15 + [math.nan])])
    metrics.close()
    _do(run, [], start=1).close()
    assert _scalars(run, "valid/valid/1024/nats_by_position/14") == [(1, 1.0)]
    [(step, empty)] = _scalars(run, "valid/valid/1024/nats_by_position/15")
    assert step == 1 and math.isnan(empty)


def test_metrics_lines_say_when_they_were_written_and_tensorboard_does_not(run, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1234.5)
    _do(run, [1]).close()
    assert _lines(run)[0]["time"] == 1234.5
    assert _scalars(run, "time") == []


@pytest.mark.parametrize(("mfu", "warnings"), [(0.99, 0), (1.01, 1)])
def test_metrics_mfu_is_of_the_peak_of_all_ranks_and_above_one_warned_of_once(run, monkeypatch, caplog, mfu, warnings):
    tokens = run.train.global_batch * run.train.seq_len_tokens
    flops = tokens * train_flops_per_token(run.model, run.train.seq_len_tokens)
    now_s, step_s, num_ranks = 0.0, 4.0, 2
    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    mesh = Mesh(0, 0, num_ranks, num_ranks, torch.device("cpu"))
    metrics = Metrics(run, mesh, TrainState(), flops / (mfu * step_s * num_ranks))
    for step in (1, 2):
        now_s += step_s
        metrics.step(step, (0, 8), StepResult(torch.tensor(1.0), 0.5), lr=1e-4)
        metrics.flush()
    metrics.close()
    assert [line["util/mfu"] for line in _lines(run)] == pytest.approx([mfu, mfu])
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warnings


def test_metrics_without_a_known_peak_show_no_mfu(run, caplog):
    with caplog.at_level("INFO"):
        metrics = Metrics(run, MAIN, TrainState(), None)
        metrics.step(1, (0, 8), StepResult(torch.tensor(1.0), 0.5), lr=1e-4)
        metrics.close()
    assert "mfu" not in caplog.text and "tokens/s" in caplog.text and "goodput" not in caplog.text
    assert "util/mfu" not in _lines(run)[0] and _scalars(run, "util/mfu") == []


def test_metrics_of_a_loss_that_is_not_finite_are_json_and_shown_again_after_a_restart(run):
    metrics = Metrics(run, MAIN, TrainState(), None)
    metrics.step(1, (0, 8), StepResult(torch.tensor(torch.nan), float("inf")), lr=1e-4)
    metrics.close()
    [line] = [orjson.loads(line) for line in (run.run_dir / "metrics.jsonl").read_bytes().splitlines()]
    assert (line["loss/train_nats"], line["optim/grad_norm"]) == (None, None)
    Metrics(run, MAIN, TrainState(step=1), None).close()
    [(step, loss)] = _scalars(run, "loss/train_nats")
    assert step == 1 and math.isnan(loss)


def test_metrics_flush_returns_what_it_read(run):
    metrics = Metrics(run, MAIN, TrainState(), None)
    metrics.step(1, (0, 8), StepResult(torch.tensor(2.5), 0.5), lr=1e-4)
    assert [tuple(reading) for reading in metrics.flush()] == [(1, (0, 8), 2.5, 0.5)]
    assert metrics.flush() == []


@pytest.mark.parametrize("cut_bytes", range(0, 400, 23))
def test_metrics_restart_after_a_kill_anywhere_has_every_line_once(run, cut_bytes):
    _do(run, [1, 2]).sync()  # the checkpoint of step 2
    kept = (run.run_dir / "metrics.jsonl").stat().st_size
    _do(run, [3, 4], start=2).close()
    path = run.run_dir / "metrics.jsonl"
    os.truncate(path, max(kept, path.stat().st_size - cut_bytes))
    _do(run, [3, 4], start=2).close()
    assert [line["step"] for line in _lines(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", [b'{"step": 3, "tok', b"\x00\x00\n", b"[1]\n", b'"step"\n', b'{"no": 1}\n'])
def test_metrics_restart_drops_lines_that_are_not_metrics(run, damage):
    _do(run, [1, 2]).close()
    with (run.run_dir / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    _do(run, [3], start=2).close()
    assert [line["step"] for line in _lines(run)] == [1, 2, 3]


@pytest.mark.parametrize("damage", [b"#", b"\xff", b"\x00"])
def test_metrics_restart_keeps_what_follows_a_damaged_line(run, damage, caplog):
    _do(run, [1, 2, 3]).close()
    path = run.run_dir / "metrics.jsonl"
    intact = path.read_bytes()
    second = intact.index(b"\n") + 1
    path.write_bytes(intact[:second] + damage + intact[second + 1 :])
    _do(run, [4], start=3).close()
    lines = path.read_bytes().splitlines()
    assert len(lines) == 4 and [json.loads(lines[row])["step"] for row in (0, 2, 3)] == [1, 3, 4]
    assert_warned(caplog, path, "step 3")


@pytest.mark.parametrize("pending", [False, True])
def test_metrics_restart_keeps_the_validation_of_its_step_unless_it_is_pending(run, pending):
    metrics = _do(run, [1, 2])
    metrics.valid(2, [_result()])
    metrics.close()
    again = _do(run, [], start=2, valid_owed=pending)
    if pending:
        again.valid(2, [_result()])
    again.close()
    assert [("loss/valid_nats" in line) for line in _lines(run)] == [False, False, True]
    assert _scalars(run, "loss/valid_nats") == [(2, 2.0)]
    assert _scalars(run, "loss/train_nats") == [(1, 1.0), (2, 2.0)]


def test_metrics_reach_tensorboard_once_over_a_restart_and_a_return(run):
    _do(run, [1, 2, 3]).close()
    metrics = _do(run, [3, 4, 5], start=2)
    metrics.drop_after(TrainState(step=4))
    metrics.step(5, (32, 40), StepResult(torch.tensor(50.0), 0.5), lr=1e-4)
    metrics.close()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    assert _scalars(run, "loss/train_nats") == expected
    assert [(line["step"], line["loss/train_nats"]) for line in _lines(run)] == expected


@contextmanager
def _file_size_limit(limit_bytes):
    """Let the system refuse to write beyond this size of any file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room_bytes", [-50, 0, 1, 100])
def test_metrics_of_steps_on_a_full_disk_follow_in_order_when_there_is_room(run, caplog, room_bytes):
    metrics = _do(run, [1, 2])
    with _file_size_limit((run.run_dir / "metrics.jsonl").stat().st_size + room_bytes):
        for step in (3, 4):
            metrics.step(step, (0, 8), StepResult(torch.tensor(float(step)), 0.5), lr=1e-4)
            metrics.flush()
        metrics.sync()
    assert_warned(caplog, run.run_dir / "metrics.jsonl", "File too large")
    assert len([record for record in caplog.records if "metrics.jsonl" in record.getMessage()]) == 1
    metrics.step(5, (0, 8), StepResult(torch.tensor(5.0), 0.5), lr=1e-4)
    metrics.close()
    assert [line["step"] for line in _lines(run)] == [1, 2, 3, 4, 5]
    assert _scalars(run, "loss/train_nats") == [(step, float(step)) for step in range(1, 6)]


def test_metrics_and_tensorboard_on_a_disk_that_stays_full_end_with_a_warning(run, caplog):
    metrics = _do(run, [1])
    with _file_size_limit(1):
        metrics.step(2, (0, 8), StepResult(torch.tensor(2.0), 0.5), lr=1e-4)
        metrics.close()
    assert_warned(caplog, "metrics.jsonl", "lacks")
    assert_warned(caplog, "tfevents", "lacks")
    assert [line["step"] for line in _lines(run)] == [1]


def test_metrics_tensorboard_file_cut_off_by_a_kill_loses_nothing_before_the_checkpoint(run):
    metrics = _do(run, [1, 2])
    metrics.sync()
    (events,) = (run.run_dir / "tensorboard").iterdir()
    synced = events.stat().st_size
    _after(metrics, 3)
    os.truncate(events, synced + 5)  # in the middle of a record
    _do(run, [3], start=2).close()
    assert _scalars(run, "loss/train_nats") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def _after(metrics, step):
    metrics.step(step, (0, 8), StepResult(torch.tensor(9.0), 0.5), lr=1e-4)
    metrics.flush()
    metrics.close()


def test_metrics_goodput_counts_only_steps_that_stay(run, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    metrics = Metrics(run, MAIN, TrainState(), None, began_at_s=900.0)
    for step in (1, 2):
        now[0] += 10
        metrics.step(step, (0, 8), StepResult(1.0, 1.0), lr=1e-4)
        metrics.flush()
    assert metrics.goodput() == pytest.approx(20 / 120)
    metrics.close()
    assert Metrics(run, MAIN, TrainState(step=1), None, began_at_s=900.0).goodput() == pytest.approx(10 / 120)


def test_metrics_other_ranks_write_nothing(run):
    _do(run, [1, 2], mesh=MAIN._replace(rank=1)).close()
    assert not (run.run_dir / "metrics.jsonl").exists()


def test_metrics_file_of_a_new_run_is_empty(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    assert file.step_time_s == 0 and file.last_lines == []
