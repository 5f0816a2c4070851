"""Starts a function on several gloo ranks, with a time limit and a free port."""

import itertools
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 900  # of a launch; they share two cores with another test
LAST_WORDS_S = 10.0  # that the others have when a rank has failed
# Below those that the system gives to connections, one of which would otherwise come in before a rank listens.
FIRST_PORT, NUM_PORTS = 20_000, 10_000
_places = itertools.count(os.getpid() * 1009)


def run_ranks(
    function: Callable[..., Any], num_ranks: int, folder: Path, *, time_limit_s: float = TIME_LIMIT_S, **arguments: Any
) -> list[Any]:
    """Call `function(mesh, **arguments)` on every rank of a launch; its results, by rank.

    `function` must be importable by name. Fails with the first rank's traceback, or when time is up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(function, rank, num_ranks, port, folder, arguments))
        for rank in range(num_ranks)
    ]
    outcomes = [folder / f"rank-{rank}.pickle" for rank in range(num_ranks)]
    for path in outcomes:
        path.unlink(missing_ok=True)  # of a launch before
    for process in ranks:
        process.start()
    try:
        _wait(ranks, outcomes, time.monotonic() + time_limit_s)
    finally:
        for process in ranks:
            process.kill()
    results = []
    for rank, path in sorted(enumerate(outcomes), key=lambda outcome: not outcome[1].is_file()):  # who has told first
        assert path.is_file(), f"rank {rank} of {num_ranks} did not finish within {time_limit_s} s"
        outcome, value = pickle.loads(path.read_bytes())
        assert outcome == "done", f"rank {rank} of {num_ranks}:\n{value}"
        results.append(value)
    return results


def _wait(ranks: list[Any], outcomes: list[Path], until_s: float) -> None:
    """Until all ranks are done, or one has failed, for which the others may wait long, or time is up."""
    awaited = set(outcomes)
    while any(process.is_alive() for process in ranks) and time.monotonic() < until_s:
        time.sleep(0.05)
        for path in [path for path in awaited if path.exists()]:
            awaited.remove(path)
            if pickle.loads(path.read_bytes())[0] == "failed":
                until_s = min(until_s, time.monotonic() + LAST_WORDS_S)


def _rank(function: Any, rank: int, num_ranks: int, port: int, folder: Path, arguments: dict[str, Any]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    from megatron_bipe.parallel.launch import join_launch  # after the environment is set

    try:
        outcome = ("done", function(join_launch(), **arguments))
    except BaseException:
        outcome = ("failed", traceback.format_exc())
    path = folder / f"rank-{rank}.pickle"
    path.with_suffix(".partial").write_bytes(pickle.dumps(outcome))
    path.with_suffix(".partial").replace(path)
    os._exit(0)  # a peer that failed must not keep this rank waiting in clean-up


def free_port() -> int:
    """A port that nothing listens to: another at each call, and elsewhere in each process."""
    for place in _places:
        port = FIRST_PORT + place % NUM_PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("there is always a next place")
