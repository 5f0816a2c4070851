"""States of runs from their folders alone: complete, half written, on another host, read-only."""

import json
import os
import re
import shutil
import time

import pytest
import yaml

from megatron_bipe import io
from megatron_bipe.errors import CheckpointError, ConfigError, DataError
from megatron_bipe.io import locked
from megatron_bipe.monitor.status import Limits, RunStatus, read_status
from megatron_bipe.monitor.status_text import age_text, as_json, as_prometheus, as_table
from tests.helpers.errors import raises
from tests.helpers.tools import assert_refuses, call_tool

NOW_S = 2_000_000_000.0
HOUR_S = 3600.0
GIB = 2**30


@pytest.fixture
def make_run(tmp_path):
    """A function that writes a run folder whose events have these ages in seconds."""

    def make(*events, name="run", steps=(), last_line_age_s=10.0, settings=None):
        run_dir = tmp_path / name
        run_dir.mkdir()
        train = {"steps": 1000, "log_every": 5}
        (run_dir / "config.yaml").write_text(
            yaml.safe_dump({"run_dir": str(run_dir), "train": train} | (settings or {}))
        )
        lines = [{"time": NOW_S - age_s, "event": event, **facts} for event, age_s, facts in events]
        (run_dir / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with (run_dir / "metrics.jsonl").open("w") as file:
            for step in steps:  # 2 seconds each
                at_s = NOW_S - last_line_age_s - 2 * (steps[-1] - step)
                values = {"step": step, "time": at_s, "loss/train_nats": 3.25, "time/step_s": 1.5}
                file.write(json.dumps(values | {"rate/tokens_per_s": 4096.0}) + "\n")
            if steps:
                file.write(json.dumps({"step": steps[-1], "time": NOW_S, "valid/valid/64/nats": 3.0}) + "\n")
        return run_dir

    return make


def status(run_dir, **limits):
    return read_status(run_dir, Limits(**limits), NOW_S)


def start(age_s=HOUR_S, **facts):
    return ("start", age_s, {"step": 0} | facts)


@pytest.fixture(autouse=True)
def lock_file_time(monkeypatch):
    """Locks that tests take are an hour old, as the events are."""
    record = io._record_holder

    def record_and_age(stream, job):
        record(stream, job)
        os.utime(stream.fileno(), (NOW_S - HOUR_S, NOW_S - HOUR_S))

    monkeypatch.setattr(io, "_record_holder", record_and_age)


def test_status_of_a_run_that_trains(make_run):
    run_dir = make_run(start(), steps=range(101, 301))
    with locked(run_dir / "running", lambda: None):
        found = status(run_dir)
    assert (found.state, found.step, found.steps, found.loss, found.tokens_per_s) == ("training", 300, 1000, 3.25, 4096)
    assert found.line_at_s == NOW_S - 10
    assert found.finish_at_s == pytest.approx(NOW_S - 10 + 700 * 2)
    assert found.problems == () and found.restarts == 0
    assert found.checkpoint_step is None and found.checkpoints_that_fit is None


@pytest.mark.parametrize(
    ("events", "state", "needs_attention"),
    [
        ([], "not started", False),
        ([start()], "killed", True),
        ([start(), ("stop", 10, {})], "stopped", False),
        ([start(), ("done", 10, {})], "done", False),
        ([start(), ("done", 10, {}), ("saved", 5, {"step": 7})], "done", False),
        ([start(), ("failed", 10, {"rank": 3})], "failed", True),
        ([start(), ("failed", 90, {"by": "supervisor", "wait_s": 60})], "waiting", False),
        ([start(), ("failed", 390, {"by": "supervisor", "wait_s": 60})], "waiting", False),  # --on-failure takes long
        ([start(), ("failed", 490, {"by": "supervisor", "wait_s": 60})], "failed", True),
        ([start(), ("failed", 10, {"by": "supervisor", "wait_s": None})], "failed", True),
    ],
)
def test_status_of_a_run_that_does_not_run(make_run, events, state, needs_attention):
    found = status(make_run(*events, steps=range(1, 4)))
    assert (found.state, bool(found.problems), found.finish_at_s) == (state, needs_attention, None)


def test_status_of_a_launch_without_a_line_is_starting_then_stalled(make_run):
    run_dir = make_run(start(age_s=2 * HOUR_S), start(age_s=500), steps=range(1, 4), last_line_age_s=HOUR_S)
    with locked(run_dir / "running", lambda: None):
        assert status(run_dir).state == "starting"
        found = status(run_dir, stalled_after_s=400.0)
    assert found.state == "stalled" and found.problems
    assert found.restarts == 1


def test_status_stalls_after_the_timeout_of_the_run_or_three_progress_lines(make_run):
    quick = make_run(start(), steps=range(1, 4), last_line_age_s=50.0, settings={"parallel": {"timeout_s": 40}})
    slow = make_run(
        start(),
        name="slow",
        steps=range(1, 4),
        last_line_age_s=50.0,
        settings={"parallel": {"timeout_s": 40}, "train": {"steps": 9, "log_every": 10}},
    )
    with locked(quick / "running", lambda: None), locked(slow / "running", lambda: None):
        assert [status(quick).state, status(slow).state] == ["stalled", "training"]
        assert status(quick, stalled_after_s=0.0).state == "stalled"


def test_status_restarts_are_those_of_one_day_without_the_first_start(make_run):
    ages = [100 * HOUR_S, 30 * HOUR_S, 20 * HOUR_S, HOUR_S]
    assert status(make_run(*(start(age_s=age_s) for age_s in ages))).restarts == 2
    assert status(make_run(start(), name="first")).restarts == 0


@pytest.mark.parametrize(("age_s", "state"), [(10.0, "training"), (HOUR_S, "killed")])
def test_status_of_a_launch_on_another_host_follows_from_ages_if_its_lock_looks_free(make_run, age_s, state):
    run_dir = make_run(start(), steps=range(1, 4), last_line_age_s=age_s)
    (run_dir / "running").mkdir()
    lock = run_dir / "running" / "lock"
    lock.write_text(json.dumps({"host": "node-7", "pid": 1, "job": "", "since": ""}))
    os.utime(lock, (NOW_S - HOUR_S, NOW_S - HOUR_S))
    assert status(run_dir).state == state
    lock.write_text(json.dumps({"host": io.socket.gethostname(), "pid": 1, "job": "", "since": ""}))
    os.utime(lock, (NOW_S - HOUR_S, NOW_S - HOUR_S))
    assert status(run_dir).state == "killed"


def test_status_counts_checkpoints_that_fit_and_warns_of_the_disk(make_run, monkeypatch):
    saved = ("saved", 120, {"step": 20, "bytes": 3 * GIB, "seconds": 1.0})
    run_dir = make_run(start(), saved, ("stop", 60, {}), steps=range(1, 21))
    (run_dir / "checkpoints" / "step-00000020").mkdir(parents=True)
    disk = shutil.disk_usage(run_dir)._replace(free=int(10.5 * GIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    found = status(run_dir)
    assert (found.checkpoint_step, found.checkpoint_at_s, found.checkpoints_that_fit) == (20, NOW_S - 120, 3)
    assert found.problems == () and found.free_bytes == disk.free
    [problem] = status(run_dir, least_free_gib=11.0).problems
    assert "10.50" in problem and "11.00" in problem
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=int(3.5 * GIB)))
    assert status(run_dir).checkpoints_that_fit == 0 and status(run_dir).problems
    assert status(run_dir, least_free_gib=1.0).problems == ()


def test_status_reads_only_the_ends_of_long_files(make_run):
    run_dir = make_run(start(), steps=[1, 2])
    tail = (run_dir / "metrics.jsonl").read_bytes()
    with (run_dir / "metrics.jsonl").open("wb") as file:
        file.truncate(1 << 38)  # which no machine could read at once
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + tail)
    assert status(run_dir).step == 2


def test_status_finds_the_last_step_before_a_long_line(make_run):
    run_dir = make_run(start(), steps=[1, 2])
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "valid/a/64/nats_by_position": [1.0] * 500_000}) + "\n")
    assert status(run_dir).step == 2


@pytest.mark.parametrize(
    ("lost", "shown"),
    [
        ("config.yaml", ("done", 3, None)),
        ("events.jsonl", ("not started", 3, 1000)),
        ("metrics.jsonl", ("done", 7, 1000)),
    ],
)
def test_status_of_a_half_written_folder_shows_what_is_there(make_run, lost, shown):
    run_dir = make_run(start(), ("done", 60, {"step": 7}), steps=range(1, 4))
    (run_dir / lost).unlink()
    found = status(run_dir)
    assert (found.state, found.step, found.steps) == shown


def test_status_of_damaged_files_shows_what_is_there(make_run):
    run_dir = make_run(start(), ("done", 60, {}), steps=range(1, 4))
    (run_dir / "config.yaml").write_text("train: {steps: 1")
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "loss/tr')
    with (run_dir / "events.jsonl").open("ab") as file:
        file.write(b'\xff{"time": 4')
    found = status(run_dir)
    assert (found.state, found.step, found.steps) == ("done", 3, None)


@pytest.mark.parametrize(
    "line", [{"time": "x", "event": "start"}, {"time": 1.0, "event": 5}, {"time": 1.0, "event": "start", "step": "x"}]
)
def test_status_skips_events_with_values_of_other_types(make_run, line):
    run_dir = make_run(start(), ("done", 60, {"step": 3}), steps=range(1, 4))
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert status(run_dir).state == "done"


def test_status_of_a_branch_that_has_begun_shows_the_step_of_the_trunk(make_run):
    run_dir = make_run(start(age_s=20.0, step=400, branch_from={"run": "trunk", "step": 400}))
    with locked(run_dir / "running", lambda: None):
        assert (status(run_dir).state, status(run_dir).step) == ("starting", 400)
        (run_dir / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"step": 400 + n, "time": NOW_S - 10 + 2 * n, "loss/train_nats": 3.0}) + "\n" for n in (1, 2)
            )
        )
        found = status(run_dir)
    assert (found.state, found.step, found.finish_at_s) == ("training", 402, NOW_S - 6 + 598 * 2)


def test_status_of_a_checkpoint_that_nobody_has_trained_from(make_run):
    run_dir = make_run(("average", HOUR_S, {"sources": []}))
    (run_dir / "checkpoints" / "step-00000000").mkdir(parents=True)
    found = status(run_dir)
    assert (found.state, found.step, found.checkpoint_step, found.problems) == ("not started", 0, 0, ())


def test_status_of_a_run_whose_upload_failed_after_its_end(make_run):
    late = ("after save failed", 5, {"step": 3, "reason": "exit code 1"})
    found = status(make_run(start(), ("done", 10, {"step": 3}), late, steps=range(1, 4)))
    assert (found.state, found.step, found.problems) == ("done", 3, ())


def test_status_writes_nothing_and_needs_no_permission_to(make_run):
    run_dir = make_run(start(), steps=range(1, 4))
    with locked(run_dir / "running", lambda: None):
        before = sorted((str(path), path.stat().st_mtime_ns) for path in run_dir.rglob("*"))
        status(run_dir)
        assert sorted((str(path), path.stat().st_mtime_ns) for path in run_dir.rglob("*")) == before


def test_status_of_a_folder_that_is_not_of_a_run(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with raises(CheckpointError, location=folder):
            status(folder)


UNKNOWN = RunStatus(*(None,) * len(RunStatus._fields))._replace(
    run_dir='runs/a "b"\\c\nd', state="killed", restarts=0, problems=("it was killed",)
)


def test_status_texts_show_unknown_values_as_such():
    known = UNKNOWN._replace(run_dir="runs/e", state="training", step=1500, line_at_s=NOW_S - 75, loss=2.5, problems=())
    table = as_table([UNKNOWN, known], NOW_S)
    assert "1,500" in table and "1m15s" in table and "2.5000" in table and table.endswith("it was killed")
    assert [row["step"] for row in json.loads(as_json([UNKNOWN, known]))] == [None, 1500]


SAMPLE = re.compile(r'([a-z_0-9]+)\{((?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)+)\} (\S+)')


def test_status_for_prometheus_is_in_its_format():
    known = UNKNOWN._replace(run_dir="runs/e", state="training", step=1500, loss=2.5, problems=())
    lines = as_prometheus([UNKNOWN, known]).splitlines()
    described, values = [], {}
    for line in lines:
        if line.startswith("#"):
            described.append(line.split()[1:3])
        else:
            name, labels, value = SAMPLE.fullmatch(line).groups()
            assert described[-1] == ["TYPE", name], line
            assert (name, labels) not in values
            values[name, labels] = float(value)
    assert [kind for kind, _ in described] == ["HELP", "TYPE"] * (len(described) // 2)
    assert len({name for _, name in described}) == len(described) // 2
    assert values["megatron_bipe_run_step", 'run="runs/e"'] == 1500
    escaped = r'run="runs/a \"b\"\\c\nd"'
    assert values["megatron_bipe_run_needs_attention", escaped] == 1
    assert ("megatron_bipe_run_step", escaped) not in values
    assert values["megatron_bipe_run_state", f'{escaped},state="killed"'] == 1
    assert values["megatron_bipe_run_state", f'{escaped},state="training"'] == 0


@pytest.mark.parametrize(
    ("age_s", "text"), [(-5, "0s"), (59, "59s"), (75, "1m15s"), (7500, "2h05m"), (90_000, "1d01h")]
)
def test_age_text(age_s, text):
    assert age_text(NOW_S - age_s, NOW_S) == text


def test_status_command_exit_code_and_files(make_run, tmp_path):
    now_s = time.time()
    good, bad = make_run(name="good"), make_run(name="bad")
    for run_dir, event in ((good, "done"), (bad, "failed")):
        (run_dir / "events.jsonl").write_text(json.dumps({"time": now_s, "event": event}) + "\n")
    file = tmp_path / "bipe.prom"
    assert "done" in call_tool("status", good, good, "--prometheus", file).output
    assert file.read_text().count("needs_attention{") == 1
    [one, other] = json.loads(call_tool("status", good, bad, "--json", code=1).output)
    assert (one["state"], other["state"], other["run_dir"]) == ("done", "failed", str(bad))


def test_status_command_skips_other_folders_among_runs(make_run, tmp_path):
    run_dir, other = make_run(), tmp_path / "empty"
    other.mkdir()
    shown = call_tool("status", run_dir, other, "--stalled-after", "10m").output
    assert "not started" in shown and "empty" in shown
    assert_refuses("status", [other], CheckpointError, location=other)


def test_status_command_bad_input(make_run, tmp_path):
    run_dir = make_run()
    assert_refuses("status", [run_dir, tmp_path / "absent"], CheckpointError, location="absent")
    assert_refuses("status", [run_dir, "--stalled-after", "10"], ConfigError, "'10'", location="--stalled-after")
    assert_refuses("status", [run_dir, "--least-free-gib", "-1"], ConfigError, -1, location="--least-free-gib")
    assert_refuses("status", [run_dir, "--least-free-gib", "nan"], ConfigError, "nan", location="--least-free-gib")
    assert_refuses("status", [run_dir, "--prometheus", tmp_path / "no" / "x"], DataError, location="no/x")
