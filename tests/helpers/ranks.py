"""Starts gloo ranks from a fork server that has imported the heavy libraries, with a time limit and a free port.

Measured on 2 cores: a rank in a new interpreter takes 2.9 s of CPU time until it has imported torch and DeepSpeed, and
5.4 s more until its first engine has started, for torch's compiler, which optimizers and DeepSpeed import; a fork takes
0.01 s and 0.1 s. The server only imports and starts no threads, so a fork is like a fresh process.
"""

import functools
import gc
import itertools
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from megatron_bipe.runtime.child_processes import leave_with_parent
from tests.helpers.paths import ROOT

PRELOADED = [
    *("deepspeed", "transformers", "torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("megatron_bipe.engine.engines", "megatron_bipe.train.trainer"),
]
# Limits for an idle machine with two cores; `patience` scales them.
TIME_LIMIT_S = 600  # of a launch; one that trains many layouts gets more (`layouts.time_limit_s`)
LAST_WORDS_S = 10.0  # that the others have when a rank has failed
GRACE_S = 15.0  # between SIGTERM and SIGKILL, as launchers give it
IDLE_START_S = 10.0  # of the fork server
# Below those that the system gives to connections, one of which would otherwise come in before a rank listens.
FIRST_PORT, NUM_PORTS = 20_000, 10_000
_port_numbers = itertools.count(os.getpid() * 1009)


class Ended(NamedTuple):
    """A process that has ended."""

    code: int
    output: str  # stdout and stderr


def run_ranks(
    function: Callable[..., Any], num_ranks: int, folder: Path, *, time_limit_s: float = TIME_LIMIT_S, **arguments: Any
) -> list[Any]:
    """Call `function(mesh, **arguments)` on every rank of a launch; return its results, by rank.

    `function` must be importable by name. Fails with the first rank's traceback, or when time is up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [folder / f"rank-{rank}.pickle" for rank in range(num_ranks)]
    for path in outcomes:
        path.unlink(missing_ok=True)  # of an earlier launch
    ranks = [
        start_program(_call, function, outcome, arguments, env=env)
        for env, outcome in zip(launch_variables(num_ranks), outcomes, strict=True)
    ]
    try:
        _wait(ranks, outcomes, time.monotonic() + patience(time_limit_s))
        if all(map(Path.exists, outcomes)):
            for process in ranks:
                process.join(LAST_WORDS_S)
    finally:
        for process in ranks:
            process.kill()
    results = []
    for rank, path in sorted(enumerate(outcomes), key=lambda outcome: not outcome[1].is_file()):
        assert path.is_file(), f"rank {rank} of {num_ranks} left no result within {time_limit_s} s"
        outcome, value = pickle.loads(path.read_bytes())
        assert outcome == "done", f"rank {rank} of {num_ranks}:\n{value}"
        results.append(value)
    return results


def run_programs(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    folder: Path,
    num_ranks: int = 1,
    *,
    env: Mapping[str, str] | None = None,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[Ended]:
    """Call `function(*arguments)` in a process for each rank, as a launcher runs a program; return when all have ended.

    The working folder is the repository's; each process has the variables of a launcher, and `env` besides. As by
    launchers, when one has failed the others get SIGTERM and, if that does not end them, SIGKILL.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
    for log in logs:
        log.write_bytes(b"")  # a rank may be killed before it opens its own
    variables = launch_variables(num_ranks) if num_ranks > 1 else [{}]
    ranks = [
        start_program(function, *arguments, env=both | dict(env or {}), log=log)
        for both, log in zip(variables, logs, strict=True)
    ]
    until_s, is_ending = time.monotonic() + patience(time_limit_s), False
    while any(process.is_alive() for process in ranks) and time.monotonic() < until_s:
        if not is_ending and any(process.exitcode for process in ranks):
            is_ending, until_s = True, min(until_s, time.monotonic() + patience(GRACE_S))
            for process in ranks:
                process.terminate()
        time.sleep(0.02)
    alive = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    output = "\n".join(log.read_text() for log in logs)
    assert is_ending or not alive, f"ranks {alive} ran on after {time_limit_s} s:\n{output}"
    return [Ended(process.exitcode or 0, log.read_text()) for process, log in zip(ranks, logs, strict=True)]


def patience(limit_s: float) -> float:
    """Return a time limit, longer by as much as the fork server took longer to start than on an idle machine."""
    return limit_s * max(1.0, _server_start_s() / IDLE_START_S)


@functools.cache
def _server_start_s() -> float:
    began_s = time.monotonic()
    start_program(os.getpid).join()
    return time.monotonic() - began_s


def launch_variables(num_ranks: int) -> list[dict[str, str]]:
    """Return what a launcher tells each of its ranks, as environment variables."""
    port = str(free_port())
    ranks = [str(rank) for rank in range(num_ranks)]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sizes = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    return [rendezvous | sizes | {"RANK": rank, "LOCAL_RANK": rank} for rank in ranks]


def free_port() -> int:
    """Return a port that nothing listens to: another at each call, and elsewhere in each process."""
    for number in _port_numbers:
        port = FIRST_PORT + number % NUM_PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("the numbers do not end")


def start_program(
    function: Callable[..., Any], *arguments: Any, env: Mapping[str, str] | None = None, log: Path | None = None
) -> BaseProcess:
    """Start `function(*arguments)` in a process of its own, with `env` besides this process's environment.

    The working folder is the repository's; stdout and stderr go to `log`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    read_by_server = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with mock.patch.dict(os.environ, read_by_server):
        full = dict(os.environ) | dict(env or {})
        process = context.Process(target=_begin, args=(function, full, log, arguments))
        process.start()
    return process


def _begin(function: Any, env: dict[str, str], log: Path | None, arguments: Sequence[Any]) -> None:
    """Make this fork the process that was asked for."""
    gc.freeze()  # a collection would else visit the 2 million objects of the libraries each time, for 0.5 s
    leave_with_parent()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    if log is not None:
        with log.open("wb", buffering=0) as file:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(file.fileno(), stream.fileno())
    function(*arguments)


def _call(function: Any, path: Path, arguments: dict[str, Any]) -> None:
    from megatron_bipe.runtime.distributed_init import join_launch

    try:
        outcome = ("done", function(join_launch(), **arguments))
    except BaseException:
        outcome = ("failed", traceback.format_exc())
    path.with_suffix(".partial").write_bytes(pickle.dumps(outcome))
    path.with_suffix(".partial").replace(path)
    others = [path.with_name(f"rank-{rank}.pickle") for rank in range(int(os.environ["WORLD_SIZE"]))]
    while os.environ["RANK"] == "0" and not all(map(Path.exists, others)):
        time.sleep(0.02)  # this rank holds the store, which the others may still need
    os._exit(0)  # a peer that failed must not keep this rank waiting in clean-up


def _wait(ranks: list[BaseProcess], outcomes: list[Path], until_s: float) -> None:
    """Wait until each rank has left its outcome; once one has failed or died, only a little longer for the others."""
    awaited = dict(zip(outcomes, ranks, strict=True))
    while awaited and time.monotonic() < until_s:
        time.sleep(0.02)
        for path, process in list(awaited.items()):
            is_alive = process.is_alive()  # asked first: a rank leaves its outcome before it ends
            if path.exists() or not is_alive:
                del awaited[path]
                if not path.exists() or pickle.loads(path.read_bytes())[0] == "failed":
                    until_s = min(until_s, time.monotonic() + patience(LAST_WORDS_S))
