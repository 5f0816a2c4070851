"""Small real runs by launchers, by forked ranks or inside existing ranks, and comparisons of two runs."""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bipe.checkpoint.find import find_checkpoint
from megatron_bipe.checkpoint.shard_files import KINDS, StateReader
from megatron_bipe.config.load import load_run_config
from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.commands import options
from tests.helpers.faults import Arithmetic, FaultyBatchLoader, ProcessFault, SampleFault, expose
from tests.helpers.layouts import start_engine_of
from tests.helpers.paths import ROOT

VALID_EVERY, SAVE_EVERY = 3, 2
# Location, how often a rank reaches it at most, and its duration in seconds on a small model.
LOCATIONS = (
    ("the start", 1, 3.0),
    ("loading", 1, 0.1),
    ("step", 12, 0.02),
    ("validation", 2, 0.03),
    ("checkpoint", 2, 0.08),
)
LOSSES = ("loss/train_nats", "loss/valid_nats")
_CLOCKS = ("time", "rate/", "mem/", "util/", "run/")


def launcher(num_ranks: int, port: int) -> list[str]:
    """Return the first arguments of a command that launches ranks, with or without a fault."""
    return ["torchrun", "--nproc-per-node", str(num_ranks), "--master-port", str(port), "-m", "tests.helpers.faults"]


def arguments(data: Path, run_dir: Path, *settings: str, steps: int, zero: str = "1") -> list[str]:
    """Return options of pretrain.py for a run that validates and saves; `data` has folders train and valid."""
    given = [f"data.valid_path={data / 'valid'}", f"train.valid_every={VALID_EVERY}", f"train.save_every={SAVE_EVERY}"]
    given += ["train.valid_samples=16", "parallel.timeout_s=300"]
    ds_config = ["--ds_config", f"ds_configs/zero{zero}.json"]
    return [*ds_config, *options(data / "train", run_dir, *given, *settings, steps=steps)]


def supervised(run_dir: Path, command: Sequence[str], *, failures: int = 3) -> list[str]:
    """Return the command under the supervisor."""
    tool = [sys.executable, str(ROOT / "tools" / "supervise.py"), str(run_dir)]
    return [*tool, "--failures", str(failures), "--first-wait", "0s", "--", *command]


def random_fault(chance: random.Random, kind: str, number: int, num_ranks: int, record: Path) -> ProcessFault:
    """Return a signal to a random rank, at a random moment of one of the locations in turn."""
    location, most, lasts_s = LOCATIONS[number % len(LOCATIONS)]
    rank, count, delay_s = chance.randrange(num_ranks), chance.randint(1, most), chance.uniform(0, lasts_s)
    return ProcessFault(kind, rank, location, count, delay_s, str(record))


def signals_sent(record: Path) -> list[dict[str, Any]]:
    """Return the signals that ranks recorded."""
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def train_in_rank(
    mesh: Mesh,
    data: str,
    run_dir: str,
    settings: tuple[str, ...],
    zero: int,
    steps: int,
    stop: int,
    fault: SampleFault | None,
) -> dict[int, list[list[int]]]:
    """Start or resume a run in this rank, as pretrain.py does; for use with `run_ranks`.

    Returns:
        The tokens that this rank read, by first sample of the step.
    """
    from megatron_bipe.runtime.preemption import StopRequest
    from megatron_bipe.train.profile import Profile
    from megatron_bipe.train.trainer import Trainer

    run = load_run_config(None, options(Path(data) / "train", Path(run_dir), *settings, steps=steps)[1::2])
    engine, mesh_here = start_engine_of(run, mesh, zero)
    expose(engine)
    loader = FaultyBatchLoader(run, mesh_here)
    loader.fault, loader.engine = fault, engine
    run.run_dir.mkdir(parents=True, exist_ok=True)
    watchdog, profile = _IdleWatchdog(), Profile(0, run.run_dir, mesh_here)
    trainer = Trainer(run, mesh_here, engine, loader, watchdog, StopRequest(), profile)  # type: ignore[arg-type]
    assert trainer.run(stop)
    Arithmetic.reset()
    return loader.read


class _IdleWatchdog:
    """Replacement of a watchdog that would end the process."""

    def mark(self, location: str) -> None:
        pass

    def heartbeat(self) -> None:
        pass

    def track_batches(self, location: str, items: Any) -> Any:
        return items


def metrics(run_dir: Path, *keys: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl: these keys of them, or all that do not depend on clock and machine."""
    parsed = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if (key in keys if keys else not key.startswith(_CLOCKS))}
        for line in parsed
    ]


def losses(run_dir: Path) -> list[float]:
    """Return the training losses that a run recorded, in nats."""
    return [line[LOSSES[0]] for line in metrics(run_dir) if LOSSES[0] in line]


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the losses that TensorBoard shows."""
    board = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in LOSSES}


def state(run_dir: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Return weights and moments of the newest checkpoint."""
    reader = StateReader(find_checkpoint(run_dir).folder)
    return {(name, kind): reader.full(kind, name) for name in reader.index.parameters for kind in KINDS}


def differences(found: Path, expected: Path) -> list[str]:
    """Return the names of the parts in which two runs differ; none if they are bit-identical."""
    different = []
    here, there = metrics(found), metrics(expected)
    if here != there:
        unlike = [a for a, b in zip(here, there, strict=False) if a != b] or "their number"
        different.append(f"metrics.jsonl: {len(here)} lines and {len(there)}; {unlike}")
    if scalars(found) != scalars(expected):
        different.append("TensorBoard")
    a, b = state(found), state(expected)
    different += [f"{key}" for key in b if key not in a or not torch.equal(a[key], b[key])]
    return different
