"""Parts of the GPU check: each is a function in a process of its own, which reports figures; criteria judge these.

A part appends its figures to a file as it measures them, one JSON object a line. So those of a part that crashes or
overruns its time limit are not lost, and nothing that libraries print is mistaken for a figure.
"""

import functools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_bipe.runtime.child_processes import ChildProcess

ROOT = Path(__file__).resolve().parents[2]
FIGURES, LOG = "figures.jsonl", "log.txt"
PREDICTED = " (predicted)"  # suffix of the figure with the prediction for another figure
TOY = (  # of a recipe: its sizes on a CPU
    *("model.num_layers=2", "model.hidden_size=64", "model.num_heads=4", "model.ffn_size=96", "model.intra_size=64"),
    *("model.vocab_size=512", "train.seq_len_tokens=32", "train.micro_batch=2", "train.precision=fp32"),
)
_POLL_S = 0.05

Figure = float | str
Verdict = Literal["met", "missed", "not measured", "not applicable on CPU"]


class Criterion(NamedTuple):
    """A limit on a figure.

    An aim is a speed that is worth reaching: it is reported as met or missed, but is not a failure of the check.
    """

    figure: str
    comparison: Literal["<=", ">=", "=="]
    limit: float
    gpu_only: bool = False
    is_aim: bool = False

    def judge(self, figures: Mapping[str, Figure], on_gpu: bool) -> Verdict:
        """Return the verdict; NaN meets no criterion."""
        if self.gpu_only and not on_gpu:
            return "not applicable on CPU"
        found = figures.get(self.figure)
        if not isinstance(found, (int, float)):
            return "not measured"
        return "met" if _COMPARISONS[self.comparison](found, self.limit) else "missed"


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda found, limit: found <= limit,
    ">=": lambda found, limit: found >= limit,
    "==": lambda found, limit: found == limit,
}


class Part(NamedTuple):
    """A part of the check: `function` is MODULE:NAME, called with a `Check`."""

    name: str
    limit_s: float
    function: str
    criteria: tuple[Criterion, ...] = ()


class Outcome(NamedTuple):
    """What a part measured, how it ended, and the verdicts on its criteria, in their order."""

    name: str
    failure: str  # "" if it ran to its end
    seconds: float
    figures: dict[str, Figure]
    criteria: tuple[Criterion, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def is_failed(self) -> bool:
        """Return True if it did not end, or a criterion that is not an aim is missed or was not measured."""
        judged = zip(self.criteria, self.verdicts, strict=True)
        return bool(self.failure) or any(
            verdict in ("missed", "not measured") and not criterion.is_aim for criterion, verdict in judged
        )


class Check:
    """What the function of a part works with.

    Args:
        folder: folder for its files; that of all parts is the one above.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def on_gpu(self) -> bool:
        from megatron_bipe.runtime.hardware import device_type  # imports torch

        return device_type() == "cuda"

    def report(self, name: str, value: Figure) -> None:
        """Write down a figure."""
        print(f"{name}: {value}", flush=True)
        with (self.folder / FIGURES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"figure": name, "value": value}) + "\n")

    def choose(self, on_gpu: Figure, on_cpu: Figure) -> int:
        """Return the first number on a GPU, and the second, of a toy size, on a CPU."""
        return int(on_gpu if self.on_gpu else on_cpu)


def run_part(part: Part, folder: Path, limit_s: float, on_gpu: bool, check_signals: Callable[[], None]) -> Outcome:
    """Run a part in a process that ends at the limit, with everything that it has started.

    Args:
        part: the part.
        folder: new folder for its files.
        limit_s: its limit, which may be shorter than the one of the part.
        on_gpu: judge criteria that are for GPUs.
        check_signals: raises if this process was asked to stop.
    """
    folder.mkdir(parents=True)
    began_s = time.monotonic()
    failure = "there was no time left for it" if limit_s <= 0 else _run(part, folder, limit_s, check_signals)
    figures, unreadable = read_figures(folder / FIGURES)
    verdicts = tuple(criterion.judge(figures, on_gpu) for criterion in part.criteria)
    seconds = time.monotonic() - began_s
    return Outcome(part.name, failure or unreadable, seconds, figures, part.criteria, verdicts)


def _run(part: Part, folder: Path, limit_s: float, check_signals: Callable[[], None]) -> str:
    """Return why a part failed, or "" if it ended by itself with exit code 0."""
    script = str(ROOT / "tools" / "gpu_check.py")
    command = [sys.executable, script, "--run-part", part.function, "--output", str(folder)]
    until_s = time.monotonic() + limit_s
    with (
        (folder / LOG).open("wb") as log,
        ChildProcess(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT) as child,
    ):
        while (code := child.process.poll()) is None and time.monotonic() < until_s:
            check_signals()
            time.sleep(_POLL_S)
    if code is None:
        return f"it overran its limit of {limit_s:.0f} s"
    return f"exit code {code}: {last_line(folder / LOG)}" if code else ""


def read_figures(file: Path) -> tuple[dict[str, Figure], str]:
    """Return the figures of a part, and a complaint about the file if it has anything else."""
    figures: dict[str, Figure] = {}
    if not file.exists():
        return figures, "it reported no figures"
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
            name, value = entry["figure"], entry["value"]
        except (ValueError, KeyError, TypeError):
            return figures, f"line {number} of {file} is not a figure: {line[:80]}"
        figures[name] = value if isinstance(value, str) else float(value)
    return figures, ""


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "no output"


def as_json(figures: Mapping[str, Figure]) -> dict[str, Figure]:
    """Return figures that JSON can hold: NaN and infinity as text."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
