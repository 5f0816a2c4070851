"""Collectives of a few bytes between the hosts of all ranks, over a gloo group.

They do not involve the device: reading a value from it would wait for all the work that is queued there. Objects are
plain JSON values, so that no rank runs what another process sends; named tuples and paths arrive as lists and strings.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
import torch.distributed as dist

from megatron_bipe.parallel import Mesh, all_gather_json, broadcast_json
from megatron_bipe.runtime.distributed_init import host_group_error
from megatron_bipe.runtime.exit_handling import rank_name

ROUND_S = 5.0  # duration of a round
_END = object()


def in_thread(work: Callable[[], object]) -> Iterator[None]:
    """Call `work` in a thread, and yield about once a second until it has returned: steps for `in_rounds`."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while not future.done():
            wait([future], 1.0)
            yield
        future.result()  # raises its error


class HostCollectives:
    """Host-side (gloo) collectives; all ranks create this object and call each method together.

    Args:
        mesh: this rank; the process group must be initialized.

    Raises:
        ConfigError: ranks of several hosts could not connect.
    """

    def __init__(self, mesh: Mesh) -> None:
        try:
            self._group = dist.new_group(backend="gloo") if mesh.num_ranks > 1 else None
        except RuntimeError as error:
            raise host_group_error(mesh, error) from error
        self.names: list[str] = self.all_gather_object(rank_name(mesh))  # with their hosts

    def any_rank(self, here: bool) -> bool:
        """Return True if `here` is true on any rank."""
        return bool(self._all_reduce(int(here), dist.ReduceOp.MAX))

    def all_reduce_sum(self, number: int) -> int:
        return self._all_reduce(number, dist.ReduceOp.SUM)

    def broadcast_object(self, thing: Any) -> Any:
        """Return the main rank's JSON value; those of other ranks are ignored."""
        return json.loads(json.dumps(thing)) if self._group is None else broadcast_json(thing, self._group)

    def all_gather_object(self, thing: Any) -> list[Any]:
        """Return the JSON values of all ranks, by rank."""
        return [json.loads(json.dumps(thing))] if self._group is None else all_gather_json(thing, self._group)

    def in_rounds(self, work: Iterable[object]) -> Iterator[None]:
        """Do work on all ranks that may take much longer on some of them; yield after each round on every rank.

        A rank that has finished takes part in the remaining rounds, so that it need not wait long for the others.

        Args:
            work: this rank's work, in steps; it contains no collectives.
        """
        steps, is_done = iter(work), False
        while self.any_rank(not is_done):
            until_s = time.monotonic() + ROUND_S
            while not is_done and time.monotonic() < until_s:
                is_done = next(steps, _END) is _END
            yield

    def _all_reduce(self, number: int, operation: dist.ReduceOp.RedOpType) -> int:
        numbers = torch.tensor(number)
        if self._group is not None:
            dist.all_reduce(numbers, operation, group=self._group)
        return int(numbers)
