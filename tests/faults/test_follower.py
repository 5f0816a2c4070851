"""A follower that is killed while the run trains evaluates every checkpoint once, with the results of validation."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.ranks import patience
from tests.helpers.small_runs import arguments
from tests.helpers.tools import run_pretrain

LENGTHS, STEPS, LIMIT_S = (16, 32), 4, 240.0  # validated after steps 3 and 4, saved after 2 and 4


@contextmanager
def follower(run_dir: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command in the block, and kill it at the end."""
    command = [sys.executable, "tools/evaluate.py", "follow", str(run_dir), "--device", "cpu", "--poll-s", "0.1"]
    command += options
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def content(run_dir: Path) -> bytes:
    path = run_dir / "evaluations.jsonl"
    return path.read_bytes() if path.exists() else b""


def evaluations(run_dir: Path) -> dict[tuple[int, int], Any]:
    """Return the values by step and length; each must be there once."""
    lines = [json.loads(line) for line in content(run_dir).splitlines()]
    found = {(line["step"], line["length_tokens"]): line["values"] for line in lines}
    assert len(found) == len(lines)
    return found


def wait_for_lines(run_dir: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a follower that runs has written lines."""
    until_s = time.monotonic() + patience(LIMIT_S)
    while content(run_dir).count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until_s
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_follower_evaluates_each_checkpoint_of_a_training_run_once(
    train_and_valid: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    given = arguments(train_and_valid, run_dir, f"train.valid_lengths={list(LENGTHS)}", steps=STEPS)
    run_pretrain([*given, "--stop-step", 2], tmp_path / "logs")
    with follower(run_dir, "--keep-going") as killed:
        wait_for_lines(run_dir, 1, killed)
    before = content(run_dir)
    assert (run_dir / "following" / "lock").exists()  # it had no time to leave
    with follower(run_dir, "--keep-going") as first:
        run_pretrain(given, tmp_path / "logs")
        wait_for_lines(run_dir, 3, first)  # the last one is of a checkpoint that did not exist when it began
        with follower(run_dir) as second:
            output = second.communicate(timeout=patience(LIMIT_S))[1]
        assert second.returncode == 1 and f"process {first.pid}" in output, output
        first.send_signal(signal.SIGTERM)
        output = first.communicate(timeout=patience(LIMIT_S))[1]
    assert first.returncode == 75 and "SIGTERM" in output, output
    assert content(run_dir).startswith(before)
    with follower(run_dir) as process:
        output = process.communicate(timeout=patience(LIMIT_S))[1]
    assert process.returncode == 0, output
    assert not (run_dir / "following").exists()
    found = evaluations(run_dir)
    assert found.keys() == {(step, length) for step in (2, STEPS) for length in LENGTHS}
    in_loop = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    for length in LENGTHS:
        for ours, theirs in (("nats_per_token", "nats"), ("perplexity", "perplexity"), ("bits_per_byte",) * 2):
            assert found[STEPS, length][ours] == pytest.approx(in_loop[f"valid/valid/{length}/{theirs}"], rel=1e-5)
