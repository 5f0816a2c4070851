"""Commands as a user types them, with a small model, and the processes that they leave behind."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.helpers.paths import BIN, ROOT
from tests.helpers.ranks import patience

TIME_LIMIT_S = 300
LEAVE_LIMIT_S = 30  # of processes that are to end: 3 times what they take at most, for a loaded machine
MARK = "STARTED_BY_TEST"
MODEL = "model={num_layers: 2, hidden_size: 32, num_heads: 4, ffn_size: 48, vocab_size: 400, intra_size: 64}"
TRAIN = "seq_len_tokens: 32, global_batch: 8, micro_batch: 2, precision: fp32, log_every: 1"
TEXTS = [["hello world. this is a text of some length. " * 20] * 20]


class EndedCommand(NamedTuple):
    """Result of a command that has ended."""

    code: int
    output: str
    left: list[int]  # its processes that were still running


def options(data: Path, run_dir: Path, *settings: str, steps: int = 2) -> list[str]:
    """Return options of pretrain.py for a model with two layers."""
    train = f"train={{steps: {steps}, {TRAIN}}}"
    given = [
        f"data.path={data}",
        "data.valid_path=null",
        f"run_dir={run_dir}",
        MODEL,
        "optimizer.warmup_steps=0",
        train,
    ]
    return flags([*given, *settings])


def flags(settings: Sequence[str]) -> list[str]:
    """Return settings of a run as options of a command."""
    return [part for setting in settings for part in ("--set", setting)]


def run_all(
    commands: Sequence[Sequence[str]], env: Mapping[str, str] | None = None, limit_s: float = TIME_LIMIT_S
) -> list[EndedCommand]:
    """Run commands concurrently in the repository's folder, and finally kill their remaining processes."""
    mark = uuid.uuid4().hex
    full = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", MARK: mark}
    full |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    full.pop("VIRTUAL_ENV", None)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # torchrun leaves folders behind there
        full |= {"TMPDIR": folder, **(env or {})}
        started = [
            subprocess.Popen(command, cwd=ROOT, env=full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for command in commands
        ]
        outputs = []
        try:
            outputs = [process.communicate(timeout=patience(limit_s))[0] for process in started]
        finally:
            left = marked(mark)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
    return [EndedCommand(process.returncode, output, left) for process, output in zip(started, outputs, strict=True)]


def run(*command: str, env: Mapping[str, str] | None = None, limit_s: float = TIME_LIMIT_S) -> EndedCommand:
    """Run one command."""
    return run_all([command], env, limit_s)[0]


def marked(mark: str) -> list[int]:
    """Return the processes with the marker in their environment, and their descendants."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def left_after(marks: Iterable[str], limit_s: float) -> list[str]:
    """Return the commands of marked processes that still run after the timeout, and kill them."""
    marks, limit_s = list(marks), patience(limit_s)  # the first call of it takes long
    until_s = time.monotonic() + limit_s
    while any(map(marked, marks)) and time.monotonic() < until_s:
        time.sleep(0.1)
    left = []
    for pid in [pid for mark in marks for pid in marked(mark)]:
        with suppress(OSError):  # it has just ended
            left.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
            os.kill(pid, signal.SIGKILL)
    return left
