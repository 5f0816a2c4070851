"""No child process outlives its parent, whether a command of this project or DeepSpeed's launcher, however it ends."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from tests.helpers.commands import LEAVE_LIMIT_S, MARK, TEXTS, left_after, marked, options
from tests.helpers.paths import BIN, ROOT

START_S = 900  # until a command has started; imports have taken 160 s on a machine that was 7 times overloaded
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


def _start(command, mark, log):
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", MARK: mark}
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)


def _commands(mark):
    found = []
    for pid in marked(mark):
        try:
            found.append(Path(f"/proc/{pid}/cmdline").read_text().split("\0"))
        except OSError:  # it has just ended
            continue
    return found


def _wait(is_so, process, log):
    until_s = time.monotonic() + START_S
    while not is_so():
        assert process.poll() is None and time.monotonic() < until_s, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_parents_of_this_project_leave_no_process(tmp_path):
    stubborn = ["bash", "-c", "trap '' TERM; sleep 300; true"]
    tools = {  # with a word of the command that each is expected to start
        "quickstart": (["--output", str(tmp_path / "quickstart")], "tools/corpus.py"),
        "study": (["examples/studies/encodings.yaml", "--output", str(tmp_path / "study")], "tools/corpus.py"),
        "supervise": ([str(tmp_path), "--", *stubborn], "300"),
    }
    started = []
    for tool, (arguments, word) in tools.items():
        for number in ENDS:
            mark, log = uuid.uuid4().hex, tmp_path / f"{tool}-{number}.log"
            process = _start([sys.executable, f"tools/{tool}.py", *arguments], mark, log)
            _wait(lambda mark=mark, word=word: any(word in words for words in _commands(mark)), process, log)
            process.send_signal(number)
            started.append((mark, process))
    assert not left_after([mark for mark, _ in started], LEAVE_LIMIT_S)
    assert all(process.wait() != 0 for _, process in started)


@pytest.mark.slow
@pytest.mark.parametrize(("word", "num_ranks"), [("deepspeed", 2), ("deepspeed.launcher.launch", 1)])
def test_killed_deepspeed_launcher_ends_its_ranks(tmp_path, write_text_dataset, free_port, word, num_ranks):
    write_text_dataset(tmp_path / "data", TEXTS)
    mark, log = uuid.uuid4().hex, tmp_path / "log"
    launcher = ["deepspeed", "--num_accelerators", str(num_ranks), "--master_port", str(free_port())]
    arguments = options(tmp_path / "data", tmp_path / "run", "train.save_every=0", steps=10**6)
    process = _start([*launcher, "pretrain.py", "--ds_config", "ds_configs/zero1.json", *arguments], mark, log)
    try:
        _wait(lambda: "step 2/" in log.read_text(), process, log)
        ranks = [pid for pid in marked(mark) if "pretrain.py" in psutil.Process(pid).cmdline()[2:3]]
        assert len(ranks) == num_ranks
        for pid in marked(mark):
            if any(Path(part).name == word for part in psutil.Process(pid).cmdline()[:4]):
                os.kill(pid, signal.SIGKILL)
    finally:
        left = left_after([mark], LEAVE_LIMIT_S)
    assert not left, log.read_text()
    assert f"{word} (process" in log.read_text()
