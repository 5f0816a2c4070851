"""Measurements of a preflight that involve several ranks: clocks, process groups, and the rate of all-reduces."""

import socket
import statistics
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_bipe.parallel import Mesh
from megatron_bipe.runtime.host_collectives import HostCollectives
from megatron_bipe.runtime.preflight_facts import Bounded
from megatron_bipe.runtime.preflight_steps import SkippedError

_CLOCK_S = 1.0  # largest difference of clocks: times in logs and of files are compared
_PINGS = 5
_EXTRA_S = 120.0  # of the groups' timeouts, after which NCCL ends the process, beyond the limit of a step
_SIZES_BYTES = {"cuda": (2**20, 2**25, 2**28), "cpu": (2**20, 2**23)}
_ROUNDS = 5
_SLOW_SHARE = 0.5  # of the median over ranks, in the largest all-reduce within hosts
_LINK_SHARE = 0.25  # of NVLink's rate in the data sheet; without NVLink, rates are a tenth or less (estimate)


def wall_clock_s() -> float:
    return time.time()


def clock_difference(mesh: Mesh, store: dist.Store) -> Bounded:
    """Return by how many seconds this rank's clock is ahead of rank 0's at least; all ranks call this together.

    Of several exchanges the shortest counts; half of its duration is the uncertainty, which is subtracted.
    """
    if mesh.num_ranks == 1:
        raise SkippedError("there is one rank")
    if mesh.is_main:
        for rank in range(1, mesh.num_ranks):
            for number in range(_PINGS):
                store.get(f"ping/{rank}/{number}")
                store.set(f"pong/{rank}/{number}", repr(wall_clock_s()))
        return Bounded(0.0, most=_CLOCK_S)
    exchanges = [_ping(mesh, store, number) for number in range(_PINGS)]
    duration_s, ahead_s = min(exchanges, key=lambda exchange: exchange[0])
    certain_s = max(0.0, abs(ahead_s) - duration_s / 2)
    return Bounded(certain_s if ahead_s > 0 else -certain_s, most=_CLOCK_S)


def _ping(mesh: Mesh, store: dist.Store, number: int) -> tuple[float, float]:
    """Return the duration of an exchange with rank 0, and by how much this clock is ahead of the middle of it."""
    began_s, began_wall_s = time.perf_counter(), wall_clock_s()
    store.set(f"ping/{mesh.rank}/{number}", "")
    main_s = float(store.get(f"pong/{mesh.rank}/{number}"))
    duration_s = time.perf_counter() - began_s
    return duration_s, began_wall_s + duration_s / 2 - main_s


class Network:
    """The process groups of a preflight, created as training does; all ranks call each method together.

    Args:
        mesh: this rank.
        store: connection to the launch's store that nothing else uses.
        limit_s: longest time of a step of the preflight.
        doing: called with a description before each operation that waits for other ranks.
    """

    def __init__(self, mesh: Mesh, store: dist.Store, limit_s: float, doing: Callable[[str], None]) -> None:
        self._mesh, self._store, self._limit_s, self._doing = mesh, store, limit_s, doing
        self._host: HostCollectives | None = None
        self._host_ranks: list[list[int]] = []  # ranks of each host

    @property
    def backend(self) -> str:
        return "nccl" if self._mesh.device.type == "cuda" else "gloo"

    def start_group(self) -> Bounded:
        """Start the process group of all ranks, and return the seconds until its first all-reduce was complete."""
        mesh, began_s = self._mesh, time.perf_counter()
        bound = mesh.device if mesh.device.type == "cuda" and mesh.num_ranks > 1 else None  # as DeepSpeed does
        timeout = timedelta(seconds=self._limit_s + _EXTRA_S)
        self._doing(f"connecting {self.backend}")
        dist.init_process_group(
            self.backend,
            store=self._store,
            rank=mesh.rank,
            world_size=mesh.num_ranks,
            timeout=timeout,
            device_id=bound,
        )
        self._doing(f"first all-reduce of {self.backend}")
        ones = torch.ones(1, device=mesh.device)
        dist.all_reduce(ones)
        if int(ones) != mesh.num_ranks:
            raise RuntimeError(f"the sum of a one on each of {mesh.num_ranks} ranks is {float(ones)}")
        return Bounded(time.perf_counter() - began_s)

    def start_host_group(self) -> Bounded:
        """Start the host-side group, and return the seconds that it took."""
        began_s = time.perf_counter()
        self._doing("connecting the host-side group (gloo)")
        self._host = HostCollectives(self._mesh)
        hosts: dict[str, list[int]] = {}
        for rank, host in enumerate(self._host.all_gather_object(socket.gethostname())):
            hosts.setdefault(host, []).append(rank)
        self._host_ranks = list(hosts.values())
        return Bounded(time.perf_counter() - began_s)

    def rates_within_hosts(self, nvlink_bytes_s: float | None = None) -> dict[str, Bounded]:
        """Return the bus bandwidth among the ranks of this host, GB/s, by size; hosts measure at the same time.

        On GPUs, a host must reach a share of the median, and of NVLink's rate if the GPUs have it. Through PCIe, the
        rate depends on the machine's switches and processors.
        """
        self._doing("creating the groups of the hosts")
        groups = [dist.new_group(ranks) if len(ranks) > 1 else None for ranks in self._host_ranks]
        own = next(index for index, ranks in enumerate(self._host_ranks) if self._mesh.rank in ranks)
        group, num_ranks = groups[own], len(self._host_ranks[own])
        rates = self._rates(group, num_ranks) if group is not None else {}
        assert self._host is not None
        label = next(reversed(rates), "")
        largest = self._host.all_gather_object(rates.get(label))
        if not rates:
            raise SkippedError("there is one rank on this host")
        found = {label: Bounded(rate) for label, rate in rates.items()}
        if self._mesh.device.type == "cuda":
            median = statistics.median(rate for rate in largest if rate is not None)
            least = max(_SLOW_SHARE * median, _LINK_SHARE * (nvlink_bytes_s or 0) / 1e9)
            found[label] = Bounded(rates[label], least)
        return found

    def rates_of_all_ranks(self) -> dict[str, Bounded]:
        """Return the bus bandwidth among all ranks, GB/s, by size."""
        if len(self._host_ranks) == 1:
            raise SkippedError("there is one host")
        return {label: Bounded(rate) for label, rate in self._rates(None, self._mesh.num_ranks).items()}

    def _rates(self, group: dist.ProcessGroup | None, num_ranks: int) -> dict[str, float]:
        """Return the bus bandwidth of all-reduces in a group (None: of all ranks), GB/s.

        It is bytes / time x 2 (R - 1) / R, the rate at which each of R ranks sends, as nccl-tests defines it.
        """
        rates = {}
        for size_bytes in _SIZES_BYTES[self._mesh.device.type]:
            label = f"{size_bytes / 2**20:g} MiB"
            self._doing(f"all-reduce of {label} among {num_ranks} ranks")
            x = torch.zeros(size_bytes // 4, device=self._mesh.device)
            dist.all_reduce(x, group=group)
            self._wait_for_device()
            began_s = time.perf_counter()
            for _ in range(_ROUNDS):
                dist.all_reduce(x, group=group)
            self._wait_for_device()
            duration_s = (time.perf_counter() - began_s) / _ROUNDS
            rates[label] = size_bytes / duration_s * 2 * (num_ranks - 1) / num_ranks / 1e9
        return rates

    def _wait_for_device(self) -> None:
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)
