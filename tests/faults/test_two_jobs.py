"""Two launches on one run folder: the second is refused, whatever the first is doing; once it is gone, none is."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.commands import TEXTS, options, run
from tests.helpers.paths import ROOT

TIME_LIMIT_S = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_text_dataset):
    folder = tmp_path_factory.mktemp("data")
    write_text_dataset(folder, TEXTS)
    return folder


def command(data, run_dir, *settings, stop_step):
    train = ["--stop-step", str(stop_step), "--ds_config", "ds_configs/zero1.json"]
    return [sys.executable, "pretrain.py", *train, *options(data, run_dir, *settings, steps=100_000)]


def test_two_jobs_on_one_run_folder_the_second_is_refused_until_the_first_is_gone(data, tmp_path):
    run_dir = tmp_path / "run"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        command(data, run_dir, "train.save_every=5", stop_step=100_000),
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until_s = time.monotonic() + TIME_LIMIT_S
        while not (run_dir / "checkpoints" / "latest").exists():
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < until_s
            time.sleep(0.1)
        second = run(*command(data, run_dir, stop_step=100_000))
        assert second.code == 2, second.output
        assert "Another run is writing to this folder" in second.output and str(run_dir) in second.output
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        output = first.communicate()[0]
    assert "Traceback" not in output
    saved = max(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))
    third = run(*command(data, run_dir, stop_step=saved + 10))
    assert third.code == 0, third.output
    assert f"continuing {run_dir} from step " in third.output and f"saved {run_dir}" in third.output
    changed = run(*command(data, run_dir, "optimizer.lr=2e-4", "train.seed=7", stop_step=saved + 20))
    assert changed.code == 2
    assert "optimizer.lr was 0.0001 and is now 0.0002; train.seed was 1234 and is now 7" in changed.output
    allowed = run(*command(data, run_dir, "optimizer.lr=2e-4", stop_step=saved + 20), "--allow", "optimizer")
    assert allowed.code == 0, allowed.output
    assert f"continuing {run_dir} from step {saved + 10}" in allowed.output
