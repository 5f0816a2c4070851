"""What ranks tell each other outside of collectives, and what it tells of one that does not go on."""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import NamedTuple, TypeVar

import torch.distributed as dist

ANSWER_S = 10.0  # a store that takes longer stands still

_LISTED = 4  # ranks named of those at one place

Result = TypeVar("Result")


class Heartbeat(NamedTuple):
    """A rank's last sign of life."""

    beats: int
    name: str
    location: str


Heartbeats = Mapping[int, Heartbeat | None]  # by rank; None: there never was one


class Shutdown(NamedTuple):
    """Why the launch ends."""

    text: str
    code: int
    stacks: bool = False  # whether each rank is to show where it is


class HeartbeatStore:
    """One rank's view of the store of a launch.

    Rank 0's process may hold the store, and stop. So no call waits for it longer than `ANSWER_S`.

    Args:
        store: a connection for this object alone.
        rank: this rank.
        num_ranks: of the launch.

    All methods raise `torch.distributed.DistError` if the store is gone, `TimeoutError` if it does not answer.
    """

    def __init__(self, store: dist.Store, rank: int, num_ranks: int) -> None:
        self._store, self._rank, self._num_ranks = store, rank, num_ranks
        self._caller = ThreadPoolExecutor(1, "roll-call")

    def sign(self, sign: Heartbeat) -> None:
        """Leave a sign of life."""
        self._ask(lambda: self._store.set(f"rank-{self._rank}", json.dumps(sign)))

    def signs(self) -> Heartbeats:
        """The last sign of every rank."""
        return {rank: self._ask(partial(self._sign_of, rank)) for rank in range(self._num_ranks)}

    def is_first_to_fail(self) -> bool:
        """Claim to be the first rank that fails."""
        return self._ask(lambda: self._store.add("failures", 1)) == 1

    def end(self, end: Shutdown) -> None:
        """Tell all ranks to leave."""
        self._ask(lambda: self._store.set("end", json.dumps(end)))

    def ended(self) -> Shutdown | None:
        """What all ranks were told."""
        return self._ask(lambda: Shutdown(*json.loads(self._store.get("end"))) if self._store.check(["end"]) else None)

    def finish(self, timeout_s: float) -> None:
        """Wait, on rank 0, whose store it may be, until every rank has called this."""
        if self._ask(lambda: self._store.add("finished", 1)) == self._num_ranks:
            self._ask(lambda: self._store.set("all finished", ""))
        if self._rank == 0:
            self._store.wait(["all finished"], timedelta(seconds=timeout_s))
        self._caller.shutdown()

    def _sign_of(self, rank: int) -> Heartbeat | None:
        key = f"rank-{rank}"
        return Heartbeat(*json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _ask(self, question: Callable[[], Result]) -> Result:
        return self._caller.submit(question).result(ANSWER_S)


def silent_ranks(before: Heartbeats, after: Heartbeats, own_rank: int) -> Iterator[str]:
    """Ranks that gave no sign between two looks, with the place they were last at."""
    for rank, sign in after.items():
        if sign is None:
            yield f"No sign of life, ever: rank {rank}"
        elif rank != own_rank and sign == before[rank]:
            yield f"No sign of life: {sign.name}, last at {sign.location}"


def where_ranks_are(before: Heartbeats, after: Heartbeats, own_rank: int) -> Iterator[str]:
    """Silent ranks, then all places with the ranks there, the fewest first: one that all others wait for is alone."""
    yield from silent_ranks(before, after, own_rank)
    names: dict[str, list[str]] = {}
    for sign in after.values():
        if sign is not None:
            names.setdefault(sign.location, []).append(sign.name)
    for location, found in sorted(names.items(), key=lambda item: len(item[1])):
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        yield f"At {location}: {', '.join(found[:_LISTED])}{more}"
