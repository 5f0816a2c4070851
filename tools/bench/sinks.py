"""Time that the logs of a run and their receivers take from the training loop, as a share of a step.

Each call is what the loop waits for. A row without calls is a comparison that does not count: it shows what a tracker
adds. The tracker's thread reads metrics.jsonl at the same time and keeps the lines in memory; the webhook is a port of
this host that accepts connections and never answers, which is the worst case. The default of --step-s is the time of a
step of the 151M model on two CPU cores (docs/reliability.md).

Example: python tools/bench/sinks.py --step-s 0.5
"""

import argparse
import logging
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._bench import describe_machine, median_seconds
from megatron_bipe.config import RunConfig, load_run_config
from megatron_bipe.engine.interface import StepResult
from megatron_bipe.parallel import Mesh
from megatron_bipe.run_files import START
from megatron_bipe.text_table import text_table
from megatron_bipe.train.alerts import Alerts
from megatron_bipe.train.metrics import Metrics
from megatron_bipe.train.metrics_file import SAVED, Events, Line
from megatron_bipe.train.trackers import History, InBackground, Sink
from megatron_bipe.train.train_state import TrainState

MAIN = Mesh(0, 0, 1, 1, torch.device("cpu"))
CALLS, REPEATS = 50, 9
EVENTS_PER_STEP = 0.01  # more than a run has


class Row(NamedTuple):
    """A row of the table."""

    name: str
    calls_per_step: float
    call: Callable[[], None]


class _Memory(Sink):
    """Sink that keeps the lines in memory."""

    def begin(self, history: History) -> None:
        self.lines = list(history.lines())

    def write(self, lines: Sequence[Line]) -> None:
        self.lines += lines

    def close(self) -> None:
        self.lines = []


def _rows(folder: Path, port: int) -> list[Row]:
    plain, tracked = (load_run_config(None, [f"run_dir={folder / name}"]) for name in ("plain", "tracked"))
    plain_step, tracked_step = _step_of(plain, []), _step_of(tracked, [InBackground("memory", _Memory(), print)])
    alerts = Alerts(f"http://127.0.0.1:{port}", folder)
    events, told = Events(folder, True), Events(folder, True, alerts.add)
    return [
        Row("a step: metrics.jsonl and TensorBoard", 0, plain_step),
        Row("the same with a tracker", 1, tracked_step),
        Row("an event", 0, lambda: events.add(SAVED, step=1, bytes=1, seconds=1.0)),
        Row("an event, with a webhook that hangs", EVENTS_PER_STEP, lambda: told.add(START, step=1, ranks=8)),
    ]


def _step_of(run: RunConfig, sinks: Sequence[Sink]) -> Callable[[], None]:
    """Return a function that records one further step, as the loop does with train.log_every=1."""
    run.run_dir.mkdir()
    metrics, result, steps = Metrics(run, MAIN, TrainState(), None), StepResult(torch.tensor(2.0), 0.5), [0]
    for sink in sinks:
        metrics.attach(sink)

    def step() -> None:
        steps[0] += 1
        metrics.step(steps[0], (0, 8), result, 1e-4)
        metrics.flush()

    return step


def _repeated(call: Callable[[], None]) -> Callable[[int], None]:
    def calls(_: int) -> None:
        for _ in range(CALLS):
            call()

    return calls


@command
def main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-s", type=float, default=23.0, help="seconds of a step (default: %(default)s)")
    step_s = parser.parse_args(argv).step_s
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as silent:
        rows = _rows(Path(folder), silent.getsockname()[1])
        seconds = median_seconds({row.name: _repeated(row.call) for row in rows}, REPEATS)
    cells = [["", "calls per step", "ms per call", "share of a step"]]
    shares = [row.calls_per_step * seconds[row.name] / CALLS / step_s for row in rows]
    for row, share in zip(rows, shares, strict=True):
        cells.append([row.name, f"{row.calls_per_step:g}", f"{1000 * seconds[row.name] / CALLS:.3f}", f"{share:.4%}"])
    cells.append(["total", "", "", f"{sum(shares):.4%}"])
    print(f"{describe_machine('torch')}; steps of {step_s:g} s\n{text_table(cells, head=1)}")


if __name__ == "__main__":
    sys.exit(main())
