"""Starts a function on several gloo ranks, with a time limit and a free port."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 900  # of a launch; they share two cores with another test


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
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(time_limit_s)
    finally:
        for process in ranks:
            process.kill()
    results = []
    for rank in range(num_ranks):
        path = folder / f"rank-{rank}.pickle"
        assert path.is_file(), f"rank {rank} of {num_ranks} did not finish within {time_limit_s} s"
        outcome, value = pickle.loads(path.read_bytes())
        assert outcome == "done", f"rank {rank} of {num_ranks}:\n{value}"
        results.append(value)
    return results


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
