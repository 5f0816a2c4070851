"""A follower that is killed repeatedly, while the run trains, evaluates every checkpoint once."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.ranks import patience
from tests.helpers.small_runs import arguments
from tests.helpers.tools import run_pretrain

LENGTHS, STEPS, KILLS, LIMIT_S = (16, 32), 12, 3, 120.0


def start_follower(run_dir: Path, *options: str) -> subprocess.Popen[str]:
    lengths = ",".join(map(str, LENGTHS))
    command = [sys.executable, "tools/evaluate.py", "follow", str(run_dir), "--lengths", lengths, "--device", "cpu"]
    return subprocess.Popen([*command, "--poll-s", "0.1", *options], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def content(run_dir: Path) -> bytes:
    path = run_dir / "evaluations.jsonl"
    return path.read_bytes() if path.exists() else b""


def evaluations(run_dir: Path) -> dict[tuple[int, int], Any]:
    """Return the values by step and length; each must be there once."""
    lines = [json.loads(line) for line in content(run_dir).splitlines()]
    found = {(line["step"], line["length_tokens"]): line["values"] for line in lines}
    assert len(found) == len(lines)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + patience(LIMIT_S)
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def kill_after_lines(run_dir: Path, count: int) -> None:
    """Start a follower, and kill it when it has appended so many lines."""
    before = content(run_dir)
    follower = start_follower(run_dir, "--keep-going")
    try:
        wait_for(lambda: content(run_dir).count(b"\n") >= before.count(b"\n") + count)
    finally:
        follower.send_signal(signal.SIGKILL)
        follower.communicate()
    assert content(run_dir).startswith(before)
    assert (run_dir / "following" / "lock").exists()  # it had no time to leave


@pytest.mark.slow
def test_killed_follower_evaluates_each_checkpoint_of_a_training_run_once(
    train_and_valid: Path, tmp_path: Path
) -> None:
    run_dir, chance = tmp_path / "run", random.Random(3)
    given = arguments(train_and_valid, run_dir, steps=STEPS)
    run_pretrain([*given, "--stop-step", 4], tmp_path / "logs")
    kill_after_lines(run_dir, 1)
    follower = start_follower(run_dir, "--keep-going")
    run_pretrain(given, tmp_path / "logs")
    wait_for(lambda: content(run_dir).count(b"\n") >= 4)
    follower.send_signal(signal.SIGKILL)
    follower.communicate()
    for _ in range(KILLS - 2):
        kill_after_lines(run_dir, chance.randint(1, 2))

    second = shutil.copytree(run_dir, tmp_path / "second")
    (second / "evaluations.jsonl").unlink()
    for folder in (run_dir, second):
        done = start_follower(folder)
        output = done.communicate(timeout=patience(LIMIT_S))[1]
        assert done.returncode == 0, output
        assert not (folder / "following").exists()
    expected = {(step, length) for step in range(2, STEPS + 1, 2) for length in LENGTHS}
    assert evaluations(run_dir).keys() == expected
    assert evaluations(run_dir) == evaluations(second)


@pytest.mark.slow
def test_second_follower_is_refused_and_the_first_stops_on_request(train_and_valid: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_pretrain(arguments(train_and_valid, run_dir, steps=2), tmp_path / "logs")
    first = start_follower(run_dir, "--keep-going")
    wait_for(lambda: len(content(run_dir).splitlines()) == len(LENGTHS))
    second = start_follower(run_dir)
    output = second.communicate(timeout=patience(LIMIT_S))[1]
    assert second.returncode == 1 and f"process {first.pid}" in output, output
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=patience(LIMIT_S))[1]
    assert first.returncode == 75 and "SIGTERM" in output, output
    assert not (run_dir / "following").exists() and os.listdir(run_dir / "checkpoints")
