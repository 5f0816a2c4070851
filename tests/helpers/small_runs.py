"""Small real runs by real launchers, and how two of them compare."""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bipe.engine.checkpoint import find_checkpoint
from megatron_bipe.engine.state_files import KINDS, StateReader
from tests.helpers.commands import options
from tests.helpers.paths import ROOT

VALID_EVERY, SAVE_EVERY = 3, 2
# Place, how often a rank has come there at most, and the seconds that it lasts on a small model.
PLACES = (
    ("the start", 1, 3.0),
    ("loading", 1, 0.1),
    ("step", 12, 0.02),
    ("validation", 2, 0.03),
    ("checkpoint", 2, 0.08),
)
LOSSES = ("loss/train_nats", "loss/valid_nats")


def launcher(num_ranks: int, port: int) -> list[str]:
    """The beginning of a command."""
    return ["torchrun", "--nproc-per-node", str(num_ranks), "--master-port", str(port), "-m", "tests.faults.ranks"]


def arguments(data: Path, run_dir: Path, *settings: str, steps: int, zero: str = "1") -> list[str]:
    """Options of pretrain.py; `data` has folders train and valid."""
    given = [f"data.valid_path={data / 'valid'}", f"train.valid_every={VALID_EVERY}", f"train.save_every={SAVE_EVERY}"]
    given += ["train.valid_samples=16", "parallel.timeout_s=300"]
    return [
        "--ds_config",
        f"ds_configs/zero{zero}.json",
        *options(data / "train", run_dir, *given, *settings, steps=steps),
    ]


def supervised(run_dir: Path, command: Sequence[str], *, failures: int = 3) -> list[str]:
    """The command under the supervisor."""
    tool = [sys.executable, str(ROOT / "tools" / "supervise.py"), str(run_dir)]
    return [*tool, "--failures", str(failures), "--first-wait", "0s", "--", *command]


def random_moment(chance: random.Random, number: int, num_ranks: int) -> str:
    """A place of all in turn, a rank and a moment there, as tests.faults.ranks takes them."""
    place, most, lasts_s = PLACES[number % len(PLACES)]
    return f"{place}:{chance.randrange(num_ranks)}:{chance.randint(1, most)}:{chance.uniform(0, lasts_s):.4f}"


def signals_sent(file: Path) -> list[dict[str, Any]]:
    """What ranks wrote down of the signals they got."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """What the run says of its steps, without what depends on the clock and the machine."""
    parsed = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time", "rate/", "mem/", "util/", "run/")
    return [{key: value for key, value in line.items() if not key.startswith(clocks)} for line in parsed]


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The losses that TensorBoard shows."""
    board = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in LOSSES}


def state(run_dir: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Weights and moments of the newest checkpoint."""
    reader = StateReader(find_checkpoint(run_dir).folder)
    return {(name, kind): reader.whole(kind, name) for name in reader.index.parameters for kind in KINDS}


def differences(found: Path, expected: Path) -> list[str]:
    """In what two runs differ; nothing where they are the same, bit for bit."""
    said = []
    here, there = lines(found), lines(expected)
    if here != there:
        unlike = [a for a, b in zip(here, there, strict=False) if a != b] or "their number"
        said.append(f"metrics.jsonl: {len(here)} lines and {len(there)}; {unlike}")
    if scalars(found) != scalars(expected):
        said.append("TensorBoard")
    a, b = state(found), state(expected)
    said += [f"{key}" for key in b if key not in a or not torch.equal(a[key], b[key])]
    return said
