"""Contenders in processes of their own, which take turns: each has its own peak of memory, none runs beside another."""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Container, Mapping
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from megatron_bipe.runtime.child_processes import leave_with_parent
from megatron_bipe.runtime.hardware import device_type, keep_freed_memory, peak_memory_gib

Prepare = Callable[[], Callable[[], None]]  # sets up, and returns what is timed


class Turns(NamedTuple):
    """What a contender took."""

    median_s: float
    peak_gib: float  # of the device, or of the whole process on a CPU


def take_turns(contenders: Mapping[str, Prepare], repeats: int, as_it_comes: Container[str] = ()) -> dict[str, Turns]:
    """Time every contender `repeats` times, in turns, after one turn that does not count.

    `Prepare` functions must be importable by name (or partials of such).

    Args:
        contenders: by name.
        repeats: turns that count.
        as_it_comes: those that run without what this project does to the process (`keep_freed_memory`).
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    try:
        for name, prepare in contenders.items():
            pipes[name], far_end = context.Pipe()
            served = (prepare, far_end, name not in as_it_comes)
            processes.append(context.Process(target=_serve, args=served, daemon=True))
            processes[-1].start()
            pipes[name].recv()  # it is ready
            sys.stderr.write(f"ready: {name}\n")
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(repeats + 1):
            for name, pipe in pipes.items():
                pipe.send("turn")
                taken = pipe.recv()
                if turn:
                    seconds[name].append(taken)
        found = {}
        for name, pipe in pipes.items():
            pipe.send("end")
            found[name] = Turns(statistics.median(seconds[name]), pipe.recv())
        return found
    finally:
        for process in processes:
            process.kill()


def _serve(prepare: Prepare, pipe: Connection, tuned: bool) -> None:
    leave_with_parent()
    device = torch.device(device_type())
    run = prepare()
    if tuned:
        keep_freed_memory(device)
    pipe.send("ready")
    while pipe.recv() == "turn":
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - start)
    pipe.send(peak_memory_gib(device))
    pipe.recv()  # killed here, with no one else's turn disturbed by the end of a process
