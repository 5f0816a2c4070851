"""`--profile`: the time of a few updates by part of the step, as a table and as a trace of torch's profiler.

An operation belongs to the part of the step that called it. Backward is what autograd calls, including recomputation;
the optimizer marks itself; collectives are counted separately wherever they are called. The rest belongs to the engine:
casts, sums and the gradient norm.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from megatron_bipe.errors import ConfigError
from megatron_bipe.parallel import Mesh

_log = logging.getLogger(__name__)

WARM_UP_STEPS = 2  # allocate, compile and choose kernels; not profiled
PARTS = ("data", "forward", "backward", "communication", "optimizer", "engine")

# Prefixes of operation names and their parts; the innermost match applies.
_PART_OF = {
    "data": "data",  # marked by the batch loader
    "forward": "forward",  # marked by the engines
    "autograd::engine": "backward",
    "Optimizer.step": "optimizer",
    "c10d::": "communication",
    "_c10d_functional::": "communication",
    "gloo:": "communication",
    "nccl:": "communication",
    "record_param_comms": "communication",
}


class Profile:
    """Profiler of the first updates after the warm-up.

    Args:
        steps: number of updates to profile; 0: none.
        run_dir: folder whose `profile/` receives a trace of every rank, for chrome://tracing or Perfetto.
        mesh: this rank.

    Raises:
        ConfigError: `steps` is negative.
    """

    def __init__(self, steps: int, run_dir: Path, mesh: Mesh) -> None:
        if steps < 0:
            raise ConfigError(f"{steps} updates cannot be profiled", remedy="Give 1 or more", location="--profile")
        self._steps, self._folder, self._mesh = steps, run_dir / "profile", mesh
        self._done, self._began_s = 0, 0.0
        self._profiler: profile | None = None

    def step_done(self) -> None:
        """Count an update."""
        self._done += 1
        if self._steps > 0 and self._done == WARM_UP_STEPS:
            self._start()
        elif self._profiler is not None and self._done == WARM_UP_STEPS + self._steps:
            self._finish(self._profiler)

    def close(self) -> None:
        """Report the updates profiled so far, at the end of the run."""
        if self._profiler is not None and self._done > WARM_UP_STEPS:
            self._steps = self._done - WARM_UP_STEPS
            self._finish(self._profiler)
        elif self._steps and self._done <= WARM_UP_STEPS:
            if self._profiler is not None:
                self._profiler.stop()
            _log.warning(
                "--profile: the run ended after %d updates, and the first %d are warm-up", self._done, WARM_UP_STEPS
            )

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._mesh.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, acc_events=True)
        self._profiler.start()
        self._began_s = self._now_s()

    def _finish(self, profiler: profile) -> None:
        wall_s = self._now_s() - self._began_s
        profiler.stop()
        self._profiler = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._folder / f"rank_{self._mesh.rank}.json.gz"))
        except OSError as error:
            _log.warning("--profile: the trace cannot be written: %s. Training continues", error)
        if self._mesh.is_main:
            seconds = seconds_by_part(profiler.events(), on_gpu=self._mesh.device.type == "cuda")
            _log.info("%s", table(seconds, wall_s, self._steps))
            _log.info("traces of all ranks: %s", self._folder)

    def _now_s(self) -> float:
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def seconds_by_part(events: Iterable[FunctionEvent], *, on_gpu: bool) -> dict[str, float]:
    """Return the seconds of the operations of each part: of their kernels on a GPU, of themselves on a CPU."""
    seconds: Counter[str] = Counter(dict.fromkeys(PARTS, 0.0))
    for event in events:
        if event.device_type == DeviceType.CPU and not event.is_async:
            own_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            seconds[_part_of(event)] += own_us * 1e-6
    return dict(seconds)


def table(seconds: Mapping[str, float], wall_s: float, steps: int) -> str:
    """Return a table with a line for each part: seconds per update, and their fraction of the wall time."""
    lines = [f"{steps} updates of {wall_s / steps:.4f} s under the profiler"]
    rest = {"in no operation": max(0.0, wall_s - sum(seconds.values()))}  # Python code, or waiting for other ranks
    lines += [f"  {part:16} {own / steps:9.4f} s {own / wall_s:7.1%}" for part, own in (dict(seconds) | rest).items()]
    return "\n".join(lines)


def _part_of(event: FunctionEvent) -> str:
    caller: FunctionEvent | None = event
    while caller is not None:
        for start, part in _PART_OF.items():
            if caller.name.startswith(start):
                return part
        caller = caller.cpu_parent
    return "engine"
