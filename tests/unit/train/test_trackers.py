"""Trackers show what metrics.jsonl has, also after a resume and a rollback, and never hold training up."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_bipe.config import RunConfig
from megatron_bipe.config.load import load_run_config
from megatron_bipe.engine.interface import StepResult
from megatron_bipe.errors import ConfigError
from megatron_bipe.run_files import read_lines
from megatron_bipe.train import trackers
from megatron_bipe.train.metrics import Metrics
from megatron_bipe.train.metrics_file import valid_key
from megatron_bipe.train.tensorboard_file import Board
from megatron_bipe.train.trackers import InBackground, check_trackers, open_trackers, scalars
from megatron_bipe.train.train_state import TrainState
from tests.helpers.errors import assert_warned, raises
from tests.helpers.loop import MAIN
from tests.helpers.paths import ROOT
from tests.helpers.wandb_file import read_wandb_file

LIST = valid_key("code", 2048, "nats_by_position")


class Kept:
    """Sink that keeps what it has received, as a tracker that can start again does."""

    def __init__(self):
        self.lines, self.begun, self.is_closed = [], 0, False

    def begin(self, history):
        self.lines, self.begun = list(history.lines()), self.begun + 1

    def write(self, lines):
        self.lines += lines

    def close(self):
        self.is_closed = True


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(trackers, "PAUSE_S", 0.01)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return load_run_config(None, [f"run_dir={tmp_path / 'run'}", "train.steps=6"])


def recorded(run):
    return read_lines(run.run_dir / "metrics.jsonl", {"step"})


def train(run, sinks, steps, start=0, scale=1.0):
    """Make steps with a loss that depends on the attempt, and a validation after the last one."""
    metrics = Metrics(run, MAIN, TrainState(step=start), None)
    for sink in sinks:
        metrics.attach(sink)
    do(metrics, steps, scale)
    metrics._write(steps[-1], {LIST: [scale, math.nan]})
    return metrics


def do(metrics, steps, scale):
    for step in steps:
        metrics.step(step, (0, 8), StepResult(torch.tensor(scale * step), 0.5), lr=1e-4)
        metrics.flush()


def background(sink, failures=None):
    return InBackground("fake", sink, lambda *facts: failures.append(facts))


def test_tracker_has_the_lines_of_metrics_jsonl_after_resumes_and_rollbacks(run):
    first, second = Kept(), Kept()
    train(run, [background(first)], [1, 2, 3, 4]).close()
    assert first.is_closed and first.lines == recorded(run) and len(first.lines) == 5
    metrics = train(run, [background(second)], [3, 4, 5], start=2, scale=2.0)  # steps 3 and 4 are repeated
    wait_for(lambda: len(second.lines) == 6)
    metrics.drop_after(TrainState(step=3))
    do(metrics, [4, 5], 3.0)
    metrics.close()
    assert second.lines == recorded(run) and second.begun == 2
    losses = [(line["step"], line["loss/train_nats"]) for line in second.lines]
    assert losses == [(1, 1.0), (2, 2.0), (3, 6.0), (4, 12.0), (5, 15.0)]


def wait_for(is_true):
    until_s = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_tracker_that_is_slow_misses_nothing_and_does_not_hold_up_the_loop(run, monkeypatch):
    gate, sink = threading.Event(), Kept()
    monkeypatch.setattr(sink, "write", lambda lines: (gate.wait(20), Kept.write(sink, lines)))
    metrics = train(run, [background(sink)], list(range(1, 7)))  # returns while the tracker waits
    assert sink.lines == [] and not gate.is_set()
    gate.set()
    metrics.close()
    assert sink.lines == recorded(run) and len(sink.lines) == 7


def test_tracker_that_hangs_is_left_behind_with_a_warning(run, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "CLOSE_WAIT_S", 0.05)
    gate, sink = threading.Event(), Kept()
    sink.begin = lambda history: gate.wait(20)
    train(run, [background(sink)], [1, 2]).close()
    assert_warned(caplog, "fake", "0.05 s")
    assert len(recorded(run)) == 3
    gate.set()


@pytest.mark.parametrize("where", ["begin", "write", "close"])
def test_tracker_that_fails_is_one_warning_and_one_event_and_training_continues(run, where, caplog):
    failures, sink, good = [], Kept(), Kept()

    def fail(*_):
        raise RuntimeError("no space left\nmany more lines")

    setattr(sink, where, fail)
    metrics = train(run, [background(sink, failures), background(good)], [1, 2])
    metrics.drop_after(TrainState(step=1))
    do(metrics, [2, 3], 1.0)
    metrics.close()
    assert failures == [("fake", "RuntimeError: no space left")]
    assert_warned(caplog, "fake", "no space left")
    assert len(caplog.records) == 1
    assert good.lines == recorded(run) and [line["step"] for line in good.lines] == [1, 2, 3]


def test_tracker_waits_for_the_end_of_a_line(run):
    sink = Kept()
    tracker = background(sink)
    metrics = train(run, [tracker], [1])
    with (run.run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "loss')
        file.flush()
        tracker.write([])
        wait_for(lambda: len(sink.lines) == 2)
        file.write(b'/train_nats": 2.0}\n')
    metrics.close()
    assert sink.lines == recorded(run) and sink.lines[-1] == {"step": 2, "loss/train_nats": 2.0}


def test_tracker_values_of_a_list_get_the_number_of_their_part():
    values = scalars({"step": 4, "time": 1.5, "tokens": 64, LIST: [2.5, None], "loss/train_nats": None})
    assert list(values) == ["tokens", f"{LIST}/00", f"{LIST}/01", "loss/train_nats"]
    assert values[f"{LIST}/00"] == 2.5 and math.isnan(values[f"{LIST}/01"]) and math.isnan(values["loss/train_nats"])


def test_tensorboard_shows_lists_as_scalars(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(run, [], [1, 2], scale=3.0).close()
    board = EventAccumulator(str(run.run_dir / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in board.Scalars(f"{LIST}/00")] == [(2, 3.0)]


def test_tensorboard_that_was_never_begun_can_be_closed(tmp_path):
    Board(tmp_path / "board").close()
    assert list((tmp_path / "board").iterdir()) == []


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_tracker_that_is_not_installed_is_refused_before_the_start(name, monkeypatch):
    run = load_run_config(None, [f"tracking.{name}={{}}"])
    with monkeypatch.context() as patched:
        patched.setattr(trackers, "find_spec", lambda _: None)
        with raises(ConfigError, name, location=f"tracking.{name}", remedy=f"pip install -e '.[{name}]'"):
            check_trackers(run)
        check_trackers(RunConfig())
    with monkeypatch.context() as patched:
        patched.setattr(trackers, "find_spec", lambda _: object())
        check_trackers(run)


def needs(name):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed (docs/testing.md)")


def expected(run):
    """Return the values by step that metrics.jsonl has."""
    found = {}
    for line in recorded(run):
        found.setdefault(line["step"], {}).update(scalars(line))
    return found


def comparable(by_step):
    """Return values by step as text, since no number equals NaN."""
    return {step: {key: repr(float(value)) for key, value in values.items()} for step, values in by_step.items()}


@pytest.fixture
def patient(monkeypatch):
    """Let trackers start and end as slowly as they do on a loaded machine."""
    monkeypatch.setattr(trackers, "CLOSE_WAIT_S", 120.0)


def resumed_and_rolled_back(run, failures, has_resumed=lambda: True):
    """Train twice into the configured tracker, with a resume and, once the tracker has seen it, a rollback."""
    for steps, start in (([1, 2, 3, 4], 0), ([3, 4, 5], 2)):
        metrics = train(run, open_trackers(run, lambda *facts: failures.append(facts)), steps, start, 1.0 + start)
        if start:
            wait_for(has_resumed)
            metrics.drop_after(TrainState(step=4))
            do(metrics, [5, 6], 7.0)
        metrics.close()


@needs("trackio")
def test_trackio_has_every_step_once_with_its_time(run, tmp_path, monkeypatch, patient):
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    for module in (utils, sys.modules["trackio.sqlite_storage"]):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    settings = [f"run_dir={run.run_dir}", "tracking.trackio={project: bipe, name: a}", "alerts.webhook=https://a/b"]
    other = load_run_config(None, [f"run_dir={tmp_path / 'other' / 'run'}", *settings[1:]])
    other.run_dir.mkdir(parents=True)
    failures = []
    train(other, open_trackers(other, lambda *facts: failures.append(facts)), [1]).close()
    run = load_run_config(None, settings)
    resumed_and_rolled_back(run, failures)
    assert failures == []
    records = SQLiteStorage.get_run_records("bipe")
    assert [record["name"] for record in records] == ["a", "a"]  # two folders are two runs, whatever their names
    logs = {record["id"]: SQLiteStorage.get_logs("bipe", "a", run_id=record["id"]) for record in records}
    rows = logs[trackers._folder_id(run)]
    assert len(logs[trackers._folder_id(other)]) == 2
    assert len(rows) == len(recorded(run)) and comparable(_by_step(rows)) == comparable(expected(run))
    assert {row["timestamp"][:4] for row in rows} == {time.strftime("%Y", time.gmtime())}
    config = SQLiteStorage.get_run_config("bipe", "a", run_id=trackers._folder_id(run))
    assert config["train"]["steps"] == run.train.steps and "https" not in json.dumps(config["alerts"])


def _by_step(rows):
    found = {}
    for row in rows:
        found.setdefault(row["step"], {}).update({k: v for k, v in row.items() if k not in ("timestamp", "step")})
    return found


@needs("wandb")
def test_wandb_newest_run_of_the_group_has_every_step_once(run, monkeypatch, patient):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = load_run_config(None, [f"run_dir={run.run_dir}", "tracking.wandb={project: bipe, name: a}"])
    failures = []

    def list_files():
        return sorted((run.run_dir / "wandb").glob("offline-run-*/run-*.wandb"), key=os.path.getmtime)

    resumed_and_rolled_back(run, failures, lambda: len(list_files()) == 2)
    assert failures == []
    files = list_files()
    wait_for(lambda: all(read_wandb_file(path).name for path in files))  # a process of wandb writes them
    assert len(files) == 3  # two starts and a rollback
    found = [read_wandb_file(path) for path in files]
    assert {(attempt.group, attempt.name) for attempt in found} == {("a", "a")}
    assert comparable(found[-1].values) == comparable(expected(run)) and sorted(found[-1].values) == [1, 2, 3, 4, 5, 6]
    assert [attempt.tags for attempt in found] == [set(), {"superseded"}, set()]
    assert found[-1].times[1] == pytest.approx(recorded(run)[0]["time"])


@needs("wandb")
def test_wandb_leaves_no_process_when_the_rank_is_killed(run):
    script = f"""
import os, signal, time
from megatron_bipe.config.load import load_run_config
from megatron_bipe.train.trackers import History, WandbSink
run = load_run_config(None, ["run_dir={run.run_dir}", "tracking.wandb={{}}"])
path = run.run_dir / "metrics.jsonl"
path.touch()
WandbSink(run, run.tracking.wandb).begin(History(path, 0, 0, []))
import psutil
print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    env = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    env.pop("WANDB_SERVICE", None)  # of a run of this process
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    children = done.stdout.split()
    assert children, done.stderr
    wait_for(lambda: not any(_is_alive(pid) for pid in children))


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
