"""Heartbeats that ranks exchange outside of collectives, and reports of ranks without progress."""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import NamedTuple, TypeVar

import torch.distributed as dist

ANSWER_S = 10.0  # a store that takes longer is stuck

_MAX_NAMES = 4  # ranks named per location

T = TypeVar("T")


class Heartbeat(NamedTuple):
    """The last heartbeat of a rank."""

    beats: int
    name: str
    location: str


Heartbeats = Mapping[int, Heartbeat | None]  # by rank; None: no heartbeat yet


class Shutdown(NamedTuple):
    """The reason why the launch ends."""

    text: str
    code: int
    stacks: bool = False  # True if each rank must print its stacks


class HeartbeatStore:
    """Access of one rank to the store of a launch.

    The store may be in the process of rank 0, which can hang, so no call waits for it longer than `ANSWER_S`.

    Args:
        store: a connection that nothing else uses.
        rank: this rank.
        num_ranks: ranks of the launch.

    All methods raise `torch.distributed.DistError` if the store is gone, and `TimeoutError` if it does not answer.
    """

    def __init__(self, store: dist.Store, rank: int, num_ranks: int) -> None:
        self._store, self._rank, self._num_ranks = store, rank, num_ranks
        self._executor = ThreadPoolExecutor(1, "heartbeat-store")

    def send(self, heartbeat: Heartbeat) -> None:
        self._ask(lambda: self._store.set(f"rank-{self._rank}", json.dumps(heartbeat)))

    def read_all(self) -> Heartbeats:
        """Return the last heartbeat of every rank."""
        return {rank: self._ask(partial(self._read_heartbeat, rank)) for rank in range(self._num_ranks)}

    def is_first_to_fail(self) -> bool:
        """Register a failure; return True if it is the first one of the launch."""
        num_failures: int = self._ask(lambda: self._store.add("failures", 1))
        return num_failures == 1

    def request_shutdown(self, end: Shutdown) -> None:
        """Request all ranks to exit."""
        self._ask(lambda: self._store.set("end", json.dumps(end)))

    def shutdown_request(self) -> Shutdown | None:
        """Return the shutdown request, if there is one."""
        return self._ask(lambda: Shutdown(*json.loads(self._store.get("end"))) if self._store.check(["end"]) else None)

    def finish(self, timeout_s: float) -> None:
        """Report the end; rank 0, which may host the store, waits until every rank has called this."""
        if self._ask(lambda: self._store.add("finished", 1)) == self._num_ranks:
            self._ask(lambda: self._store.set("all finished", ""))
        if self._rank == 0:
            self._store.wait(["all finished"], timedelta(seconds=timeout_s))
        self._executor.shutdown()

    def _read_heartbeat(self, rank: int) -> Heartbeat | None:
        key = f"rank-{rank}"
        return Heartbeat(*json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _ask(self, call: Callable[[], T]) -> T:
        return self._executor.submit(call).result(ANSWER_S)


def silent_ranks(before: Heartbeats, after: Heartbeats, own_rank: int) -> Iterator[str]:
    """Yield the ranks without a heartbeat between two observations, with their last location."""
    for rank, heartbeat in after.items():
        if heartbeat is None:
            yield f"No heartbeat, ever: rank {rank}"
        elif rank != own_rank and heartbeat == before[rank]:
            yield f"No heartbeat: {heartbeat.name}, last at {heartbeat.location}"


def group_ranks_by_location(before: Heartbeats, after: Heartbeats, own_rank: int) -> Iterator[str]:
    """Yield silent ranks, then ranks by location, smallest group first: a rank that all others wait for is alone."""
    yield from silent_ranks(before, after, own_rank)
    names: dict[str, list[str]] = {}
    for heartbeat in after.values():
        if heartbeat is not None:
            names.setdefault(heartbeat.location, []).append(heartbeat.name)
    for location, found in sorted(names.items(), key=lambda item: len(item[1])):
        more = f" and {len(found) - _MAX_NAMES} more" if len(found) > _MAX_NAMES else ""
        yield f"At {location}: {', '.join(found[:_MAX_NAMES])}{more}"
