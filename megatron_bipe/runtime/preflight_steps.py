"""Steps of a preflight, which all ranks take together, with a time limit for each.

Each rank reports its facts through the store of the launch, and works in a thread, so that a rank that hangs in a
collective still reports, and the main rank learns which ranks do not. The next step begins when the main rank has heard
of all ranks, or has waited long enough.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_bipe.errors import BipeError
from megatron_bipe.parallel import Mesh
from megatron_bipe.runtime.exit_handling import one_line
from megatron_bipe.runtime.preflight_facts import Fact

_SLACK_S = 5.0  # that the main rank waits beyond the limit, for the reports of ranks that reached theirs
_LEAVE_S = 5.0  # that the main rank, which hosts the store, waits for the others to read its last word

UNKNOWN_HOST = "unknown host"  # of a rank that has not started

Measures = Mapping[str, Callable[[], Any]]  # by name of the fact; the values are JSON values


class SkippedError(Exception):
    """Raised by a measurement that cannot be made here, with the reason; it is not a failure."""


class Steps:
    """The steps of one rank; all ranks create this object and call each method together.

    Args:
        mesh: this rank.
        store: connection to the launch's store that nothing else uses, since a call blocks others of its connection.
        limit_s: longest time of a step.
        host: name of this rank's host.
    """

    def __init__(self, mesh: Mesh, store: dist.Store, limit_s: float, host: str) -> None:
        self._mesh, self._store, self._limit_s, self._host = mesh, store, limit_s, host
        self._number = 0
        self._doing = ""  # what this rank waits for at the moment
        self.hosts: dict[int, str] = {}  # on the main rank: of the ranks that were heard of
        self.facts: dict[int, dict[str, Fact]] = {rank: {} for rank in range(mesh.num_ranks)}  # on the main rank
        self.lost: set[int] = set()  # ranks that did not report

    def doing(self, what: str) -> None:
        """Note what this rank waits for, for the report of a step that does not end."""
        self._doing = what

    def take(self, measures: Measures, skip: str = "") -> set[str]:
        """Measure on every rank, and return the names of the facts that some rank could not measure, on all ranks.

        Args:
            measures: measurements of this rank, made one after the other; other ranks may have others.
            skip: if not empty, nothing is measured, for this reason.
        """
        self._number += 1
        step = f"step-{self._number}"
        own = {name: Fact(skipped=skip) for name in measures} if skip else self._measured(measures)
        self._store.set(f"{step}/{self._mesh.rank}", json.dumps([self._host, own]))
        if self._mesh.is_main:
            failed = self._collect(step)
            self._store.set(f"{step}/next", json.dumps([sorted(failed), sorted(self.lost)]))
        names, lost = json.loads(self._wait(f"{step}/next", 2 * (self._limit_s + _SLACK_S)))
        self.lost = set(lost)
        return set(names)

    def broadcast(self, name: str, value: str) -> str:
        """Return the main rank's value on all ranks."""
        if self._mesh.is_main:
            self._store.set(name, value)
            return value
        return self._wait(name, self._limit_s + _SLACK_S).decode()

    def end(self, code: int) -> int:
        """Return the main rank's exit code on all ranks; the main rank, which may host the store, leaves last."""
        agreed = int(self.broadcast("code", str(code)))
        if self._mesh.is_main:
            others = [f"left/{rank}" for rank in self.hosts if rank != self._mesh.rank and rank not in self.lost]
            with suppress(dist.DistError):
                self._store.wait(others, timedelta(seconds=_LEAVE_S))
        else:
            self._store.set(f"left/{self._mesh.rank}", "")
        return agreed

    def _measured(self, measures: Measures) -> dict[str, Fact]:
        """Measure in a thread; a measurement that does not end in time becomes a problem, and the later ones, too."""
        found: dict[str, Fact] = {}

        def work() -> None:
            if self._mesh.device.type == "cuda":  # a new thread begins with the first GPU, and would use its memory
                torch.cuda.set_device(self._mesh.device)
            for name, measure in measures.items():
                found[name] = _measured(measure)

        self._doing = ""
        thread = threading.Thread(target=work, name="preflight", daemon=True)
        thread.start()
        thread.join(self._limit_s)
        at = f", at: {self._doing}" if self._doing else ""
        late = Fact(problem=f"did not end within {self._limit_s:g} s{at}")
        return {name: found.get(name, late) for name in measures}

    def _collect(self, step: str) -> set[str]:
        """Collect the facts of all ranks, and return the names of those with problems."""
        names, newly_lost = set[str](), set[int]()
        until_s = time.monotonic() + self._limit_s + _SLACK_S
        for rank in sorted(set(self.facts) - self.lost):
            try:
                self._store.wait([f"{step}/{rank}"], timedelta(seconds=max(0.01, until_s - time.monotonic())))
            except dist.DistError:  # a timeout
                newly_lost.add(rank)
                continue
            host, facts = json.loads(self._store.get(f"{step}/{rank}"))
            self.hosts[rank] = host
            self.facts[rank].update({name: Fact(*fact) for name, fact in facts.items()})
            names |= set(facts)
        for rank in newly_lost:
            self.lost.add(rank)
            self.hosts.setdefault(rank, UNKNOWN_HOST)
            late = Fact(problem=f"no answer within {self._limit_s:g} s")
            self.facts[rank].update(dict.fromkeys(names, late))
        return {name for name in names if any(self._has_problem(rank, name) for rank in self.facts)}

    def _has_problem(self, rank: int, name: str) -> bool:
        return bool(self.facts[rank].get(name, Fact()).problem)

    def _wait(self, key: str, limit_s: float) -> bytes:
        try:
            self._store.wait([key], timedelta(seconds=limit_s))
        except dist.DistError as error:
            raise BipeError(
                f"rank 0 did not answer within {limit_s:g} s, or has ended: {one_line(error)}",
                remedy="Read its output; if it was only slow, raise --timeout-s",
                location=f"rank {self._mesh.rank} on {self._host}",
                transient=True,
            ) from error
        value: bytes = self._store.get(key)
        return value


def _measured(measure: Callable[[], Any]) -> Fact:
    try:
        return Fact(json.loads(json.dumps(measure())))
    except SkippedError as error:
        return Fact(skipped=str(error))
    except Exception as error:
        text = str(error) if isinstance(error, BipeError) else one_line(error)
        return Fact(problem=f"{type(error).__name__}: {text}" if isinstance(error, BipeError) else text)
