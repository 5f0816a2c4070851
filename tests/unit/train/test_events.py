"""Recorded events of a run."""

import errno
import os
import threading
from pathlib import Path

import orjson

from megatron_bipe import io
from megatron_bipe.run_files import EVENTS, read_events
from megatron_bipe.train import metrics_file
from megatron_bipe.train.metrics_file import Events, RunObserver, record_failure
from tests.helpers.errors import assert_warned


def test_events_are_read_back_in_order_over_several_starts(tmp_path):
    for step in (0, 7):
        Events(tmp_path, True).add("start", step=step)
    assert [(event["event"], event["step"]) for event in read_events(tmp_path)] == [("start", 0), ("start", 7)]
    assert read_events(tmp_path)[0]["time"] <= read_events(tmp_path)[1]["time"]


def test_events_a_line_cut_off_by_a_crash_costs_no_other(tmp_path):
    events = Events(tmp_path, True)
    events.add("start", step=0)
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"time": 1, "ev')
    events.add("stop", step=1)
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "stop"]


def test_events_are_json_also_of_what_is_not_finite(tmp_path):
    Events(tmp_path, True).add("bad step", step=3, loss_nats=float("nan"), grad_norm=float("inf"))
    [event] = [orjson.loads(line) for line in (tmp_path / EVENTS).read_bytes().splitlines()]
    assert (event["step"], event["loss_nats"], event["grad_norm"]) == (3, None, None)


def test_events_a_damaged_line_costs_no_other(tmp_path):
    events = Events(tmp_path, True)
    for step in range(3):
        events.add("start", step=step)
    intact = (tmp_path / EVENTS).read_bytes()
    location = intact.index(b"\n") + 5
    (tmp_path / EVENTS).write_bytes(intact[:location] + b"\xff" + intact[location + 1 :])
    assert [event["step"] for event in read_events(tmp_path)] == [0, 2]


def test_events_on_a_disk_that_fails_follow_later(tmp_path, monkeypatch, caplog):
    events = Events(tmp_path, True)
    events.add("start", step=0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", _fail)
        events.add("stop", step=1)
    (tmp_path / EVENTS).rename(tmp_path / "aside")
    (tmp_path / EVENTS).mkdir()
    events.add("start", step=1)
    assert_warned(caplog, tmp_path / EVENTS, "Stale")
    (tmp_path / EVENTS).rmdir()
    (tmp_path / "aside").rename(tmp_path / EVENTS)
    events.add("done", step=2)
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "stop", "start", "done"]


def _fail(*_):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_events_show_what_happened_to_checkpoints(tmp_path):
    signs = []
    observer = RunObserver(Events(tmp_path, True), lambda: signs.append(1))
    observer.progress()
    observer.saved(10, 12_000, 0.5)
    observer.save_failed(20, "No space left on device")
    observer.fell_back(10, {20: "its SHA-256 differs"})
    record_failure(tmp_path, {"rank": 3, "reason": "ValueError"})
    saved, failed, fell_back, end = read_events(tmp_path)
    assert signs == [1]
    assert (saved["event"], saved["step"], saved["bytes"], saved["seconds"]) == ("saved", 10, 12_000, 0.5)
    assert (failed["event"], failed["step"], failed["reason"]) == ("save failed", 20, "No space left on device")
    assert (fell_back["event"], fell_back["to_step"]) == ("fell back", 10)
    assert fell_back["skipped"] == [{"step": 20, "reason": "its SHA-256 differs"}]
    assert (end["event"], end["rank"]) == ("failed", 3)


def test_events_failure_on_a_disk_that_hangs_does_not_keep_the_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file, "RECORD_WAIT_S", 0.01)
    released = threading.Event()
    monkeypatch.setattr(Events, "add", lambda *_, **__: released.wait(20))
    record_failure(tmp_path, {"rank": 0})
    released.set()


def test_events_other_ranks_write_nothing(tmp_path):
    Events(tmp_path, False).add("start", step=0)
    assert read_events(tmp_path) == []


def test_events_a_read_that_fails_for_a_while_is_repeated(tmp_path, monkeypatch):
    Events(tmp_path, True).add("done", step=3)
    monkeypatch.setattr(io, "READ_PAUSES_S", (0.0,))
    read, failures = Path.read_bytes, [OSError(errno.ESTALE, "Stale file handle")]
    monkeypatch.setattr(Path, "read_bytes", lambda path: _raise(failures.pop()) if failures else read(path))
    assert [event["step"] for event in read_events(tmp_path)] == [3]


def _raise(error):
    raise error
