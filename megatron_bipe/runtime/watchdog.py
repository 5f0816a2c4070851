"""End a launch in which a rank died or hangs, and name that rank.

A collective waits for missing ranks, and does not know which they are. So each rank has a thread that sends heartbeats
to the launch's `torch.distributed.Store`. A process that was killed or suspended, or whose host failed, sends none; a
process in an endless loop sends heartbeats from another location than the ranks that wait for it.
"""

import json
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from megatron_bipe.errors import FAILED, USER_ERROR, exit_code
from megatron_bipe.parallel import Mesh
from megatron_bipe.runtime.exit_handling import (
    abort,
    brief,
    describe,
    layout_coordinates,
    one_line,
    rank_name,
    write_stderr,
)

BEAT_S = 1.0  # between heartbeats
LOOK_S = 2.5  # between the two observations that show which ranks send none
_THREAD_FRAMES = 4  # innermost frames shown of threads other than the training thread
REPORT_WAIT_S = 15.0  # a failed rank waits this long for the report of the first one

ANSWER_S = 10.0  # a store that takes longer is stuck
_MAX_NAMES = 4  # ranks named per location
# Files with the innermost Python frame of a thread that waits for work, in the standard library and here.
_IDLE_FILES = ("threading.py", "queue.py", "selectors.py", "thread.py", "child_processes.py")
_RESUME = "The same command resumes the run from its last checkpoint, if there is one."
_KILLED = "A rank without a heartbeat was killed (for example because memory was full), is suspended, or lost its host."

STORE_ERRORS = (dist.DistError, TimeoutError)  # raised by HeartbeatStore if the store does not work
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

    @property
    def is_valid(self) -> bool:
        """True if a rank can have sent it: a launch that ends in this way has failed."""
        return isinstance(self.text, str) and self.code in (FAILED, USER_ERROR) and isinstance(self.stacks, bool)


class HeartbeatStore:
    """One rank's access to the store of a launch.

    The store may be in the process of rank 0, which can hang, so no call waits longer than `ANSWER_S`, except `finish`.
    The first call connects. If that takes longer, a thread continues it, and later calls wait for it.

    Args:
        connect: returns a connection that nothing else uses; it may wait for a store that does not exist yet.
        rank: this rank.
        num_ranks: number of ranks of the launch.

    Raises:
        torch.distributed.DistError: by any method, if the store is gone.
        TimeoutError: by any method, if the store does not answer.
    """

    def __init__(self, connect: Callable[[], dist.Store], rank: int, num_ranks: int) -> None:
        self._connection, self._rank, self._num_ranks = cache(connect), rank, num_ranks
        self._executor = ThreadPoolExecutor(1, "heartbeat-store")

    def send(self, heartbeat: Heartbeat) -> None:
        self._ask(lambda store: store.set(f"rank-{self._rank}", json.dumps(heartbeat)))

    def read_all(self) -> Heartbeats:
        """Return the last heartbeat of every rank."""
        return {rank: self._ask(partial(_read, f"rank-{rank}", Heartbeat)) for rank in range(self._num_ranks)}

    def is_first_to_fail(self) -> bool:
        """Register a failure; return True if it is the first one of the launch."""
        num_failures: int = self._ask(lambda store: store.add("failures", 1))
        return num_failures == 1

    def request_shutdown(self, end: Shutdown) -> None:
        """Request all ranks to exit."""
        self._ask(lambda store: store.set("end", json.dumps(end)))

    def shutdown_request(self) -> Shutdown | None:
        """Return the shutdown request, if there is one; a value that no rank can have written is ignored."""
        end = self._ask(partial(_read, "end", Shutdown))
        return end if end is not None and end.is_valid else None

    def finish(self, timeout_s: float) -> None:
        """Report the end; rank 0, which may host the store, waits until every rank has called this."""
        if self._ask(lambda store: store.add("finished", 1)) == self._num_ranks:
            self._ask(lambda store: store.set("all finished", ""))
        if self._rank == 0:
            self._connection().wait(["all finished"], timedelta(seconds=timeout_s))
        self._executor.shutdown()

    def _ask(self, call: Callable[[dist.Store], T]) -> T:
        return self._executor.submit(lambda: call(self._connection())).result(ANSWER_S)


def _read(key: str, kind: Callable[..., T], store: dist.Store) -> T | None:
    """Return a value of the store; None if there is none, or if it was not written by a rank."""
    try:
        return kind(*json.loads(store.get(key))) if store.check([key]) else None
    except (ValueError, TypeError):
        return None


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


Observe = Callable[[Heartbeats, Heartbeats, int], Iterable[str]]


class Watchdog:
    """Context manager that ends this rank when it fails or hangs, or when another rank has failed.

    An error in its `with` block ends the process after a message, and so does work without progress for `timeout_s`.

    Args:
        mesh: this rank's coordinates in the parallel layout.
        timeout_s: longest permitted time between two calls of `mark` or `heartbeat`, or two micro-batches.
        connect: opens a connection to the store of the launch, given a timeout in seconds.
        record: called on the rank that fails first, with what is known of the failure; it must not wait long.
    """

    def __init__(
        self,
        mesh: Mesh,
        timeout_s: float,
        connect: Callable[[float], dist.Store],
        record: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self._record = record
        self._mesh, self._timeout_s, self._connect = mesh, timeout_s, connect
        self._name = f"{rank_name(mesh)} ({layout_coordinates(mesh)})"
        self._training_thread = threading.get_ident()
        self._over = threading.Event()
        self._store: HeartbeatStore | None = None
        self._clock_s = 0.0  # excludes time in which this process was suspended
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.mark("the start")

    def mark(self, location: str) -> None:
        """Record the location of this rank, as progress."""
        self._location, self._since_s = location, self._clock_s

    def heartbeat(self) -> None:
        """Record progress at the current location."""
        self._since_s = self._clock_s

    def track_batches(self, location: str, items: Iterable[T]) -> Iterator[T]:
        """Yield micro-batches; each requested one is recorded as progress."""
        self.mark(location)

        def tracked() -> Iterator[T]:
            for number, item in enumerate(items, 1):
                self.mark(f"{location}, micro-batch {number}")
                yield item

        return tracked()

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # The launcher ends the remaining ranks when one has died; report the error first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._fail(describe(error, self._label()), one_line(error), exit_code(error), silent_ranks)
            self._thread.join(REPORT_WAIT_S)  # it ends this process once the first failed rank has reported why
            abort(f"{self._label()} leaves", exit_code(error))
        self._over.set()
        self._thread.join()
        if self._mesh.num_ranks > 1:
            self._opened().finish(self._timeout_s)

    def _watch(self) -> None:
        """Send heartbeats, and check for a shutdown request and for progress, until the block ends."""
        last, beats, failed_at_s = time.monotonic(), 0, math.inf
        has_contact = False
        while not self._over.wait(BEAT_S):
            now = time.monotonic()
            self._clock_s, last, beats = self._clock_s + min(now - last, BEAT_S + ANSWER_S), now, beats + 1
            is_stuck = self._clock_s - self._since_s > self._timeout_s
            try:
                self._beat(beats)
                if not has_contact:  # this rank may have waited for rank 0 to start the store
                    has_contact = True
                    self.heartbeat()
            except dist.DistError as error:
                if self._mesh.rank == 1:  # one of those that rank 0, which has the store, leaves behind
                    self._record_failure(_state_of_store(error))
                abort(f"{self._label()} leaves: {_state_of_store(error)}", FAILED)
            except TimeoutError as error:
                if is_stuck:
                    self._record_failure(f"no progress for {self._timeout_s:g} s", _state_of_store(error))
                    abort(f"{self._no_progress()}\n{_state_of_store(error)}", FAILED)
            if is_stuck and failed_at_s == math.inf:
                failed_at_s = self._clock_s
                self._fail(
                    self._no_progress(), f"no progress for {self._timeout_s:g} s", FAILED, group_ranks_by_location
                )
            if self._clock_s - failed_at_s > REPORT_WAIT_S:
                abort(f"{self._label()} leaves", FAILED)

    def _beat(self, beats: int) -> None:
        store = self._opened()
        frame = sys._current_frames()[self._training_thread]
        code = frame.f_code
        location = f"{self._location}, in {code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
        store.send(Heartbeat(beats, self._name, location))
        end = store.shutdown_request()
        if end is not None:
            stack = f"\n{self._label()} is in\n{self._stack()}" if end.stacks else ""
            text = end.text if self._mesh.is_main else end.text.partition("\n")[0]
            abort(f"{self._label()} leaves: {text}{stack}", end.code, cause=end.text)

    def _opened(self) -> HeartbeatStore:
        """Return the store; a rank that ends before its first heartbeat uses it only to report the end."""
        if self._store is None:
            connect = partial(self._connect, self._timeout_s)
            self._store = HeartbeatStore(connect, self._mesh.rank, self._mesh.num_ranks)
        return self._store

    def _record_failure(self, why: str, seen: str = "") -> None:
        own = {"rank": self._mesh.rank, "name": self._name, "at": self._location}
        self._record(own | {"reason": why, "seen": seen.splitlines()})

    def _fail(self, text: str, why: str, code: int, observe: Observe) -> None:
        """Report a failure; the first rank to fail also observes the others, requests the shutdown, and exits."""
        if self._store is None and self._mesh.num_ranks == 1:  # there is no one to tell
            self._record_failure(why)
            abort(text, code)
        try:
            store = self._opened()
            if not store.is_first_to_fail():
                write_stderr(f"{self._label()} failed, too: {why}")
                return
        except STORE_ERRORS as error:
            state = _state_of_store(error)
            self._record_failure(why, state)
            abort(f"{text}\n{state}. {_RESUME}", code, cause=f"{brief(text)}\n{state}")
        write_stderr(text)
        try:
            before = store.read_all()
            time.sleep(LOOK_S)
            seen = "\n".join(observe(before, store.read_all(), self._mesh.rank))
            self._over.set()
            self._record_failure(why, seen)
            stacks = observe is group_ranks_by_location  # if ranks wait for one that is stuck, all stacks are needed
            store.request_shutdown(Shutdown(f"{self._label()} failed first: {why}\n{seen}".rstrip(), code, stacks))
            if stacks:
                time.sleep(2 * BEAT_S)  # the others check every beat; when this rank exits, their collectives fail
        except STORE_ERRORS as error:
            seen = _state_of_store(error)
            self._record_failure(why, seen)
        if "No heartbeat" in seen:
            seen += f"\n{_KILLED} {_RESUME}"
        elif code != USER_ERROR:
            seen += f"\n{self._label()} failed first: {why}. {_RESUME}"
        abort(seen.strip() or f"{self._label()} leaves", code, cause=f"{brief(text)}\n{seen}")

    def _no_progress(self) -> str:
        slow = "If it was only slow, raise parallel.timeout_s"
        return f"{self._label()} has made no progress for {self._timeout_s:g} s. {slow}. It is in\n{self._stack()}"

    def _stack(self) -> str:
        """Return the stacks of all threads except this one and idle ones, the training thread last."""
        frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()}
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        others = [
            f"  thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame, _THREAD_FRAMES))}"
            for ident, frame in frames.items()
            if ident != self._training_thread and Path(frame.f_code.co_filename).name not in _IDLE_FILES
        ]
        return "".join([*others, *traceback.format_stack(frames[self._training_thread])]).rstrip()

    def _label(self) -> str:
        return f"{self._name}, at {self._location},"


def _state_of_store(error: Exception) -> str:
    state = "does not answer" if isinstance(error, TimeoutError) else f"is gone ({error})"
    return f"the store of the launch, with rank 0 or its launcher, {state}"
