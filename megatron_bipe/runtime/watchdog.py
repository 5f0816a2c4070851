"""Ends a launch in which a rank died or stands still, and names it.

A collective waits for ranks that will never come, and cannot tell which. So every rank has a thread that leaves a sign
of life in the store of the launch. A process that was killed or stopped, or whose host is gone, gives none; one that
is caught in a loop gives signs from another place than those that wait for it.
"""

import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist

from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.exit_handling import (
    FAILED,
    abort,
    describe,
    exit_code,
    layout_coordinates,
    rank_name,
    write_stderr,
)
from megatron_bipe.runtime.heartbeat import (
    ANSWER_S,
    Heartbeat,
    Heartbeats,
    HeartbeatStore,
    Shutdown,
    silent_ranks,
    where_ranks_are,
)

BEAT_S = 1.0  # between signs of life
LOOK_S = 2.5  # between the two looks that tell who gives none
_THREAD_FRAMES = 4  # innermost ones that are shown of threads beside the one that trains
LAST_WORDS_S = 15.0  # a rank that failed gives the one that failed first this long to tell all why

LOST = (dist.DistError, TimeoutError)  # what a roll call raises without a store
Item = TypeVar("Item")
Look = Callable[[Heartbeats, Heartbeats, int], Iterable[str]]


class Watchdog:
    """Watches over this rank while it is entered, and ends it when another has failed.

    An error in its block ends the process here, after a message; so does work that stands still for `timeout_s`.

    Args:
        mesh: this process, laid out.
        timeout_s: longest time between two calls of mark or `heartbeat`, or two micro-batches.
        connect: opens a connection to the store of the launch, within the seconds it is given.
    """

    def __init__(self, mesh: Mesh, timeout_s: float, connect: Callable[[float], dist.Store]) -> None:
        self._mesh, self._timeout_s, self._connect = mesh, timeout_s, connect
        self._name = f"{rank_name(mesh)} ({layout_coordinates(mesh)})"
        self._worker = threading.get_ident()
        self._over = threading.Event()
        self._roll_call: HeartbeatStore | None = None
        self._clock_s = 0.0  # without time in which this process was suspended
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.mark("the start")

    def mark(self, location: str) -> None:
        """Note where this rank is, and that it has come so far."""
        self._place, self._since_s = location, self._clock_s

    def heartbeat(self) -> None:
        """Note that this rank has come further, without another place for it."""
        self._since_s = self._clock_s

    def track_batches(self, location: str, items: Iterable[Item]) -> Iterator[Item]:
        """Micro-batches one by one; each that is asked for is progress."""
        self.mark(location)

        def noted() -> Iterator[Item]:
            for number, item in enumerate(items, 1):
                self.mark(f"{location}, micro-batch {number}")
                yield item

        return noted()

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # The launcher ends the ranks that are left when one has died; there is something to be said first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._fail(describe(error, self._who()), type(error).__name__, exit_code(error), silent_ranks)
            self._thread.join(LAST_WORDS_S)  # it ends this process once the first to fail has told why
            abort(f"{self._who()} leaves", exit_code(error))
        self._over.set()
        self._thread.join()
        if self._mesh.num_ranks > 1:
            self._connected().finish(self._timeout_s)

    def _watch(self) -> None:
        """The thread: leaves signs of life, and looks for the end."""
        last, beats, failed_at_s = time.monotonic(), 0, math.inf
        while not self._over.wait(BEAT_S):
            now = time.monotonic()
            self._clock_s, last, beats = self._clock_s + min(now - last, BEAT_S + ANSWER_S), now, beats + 1
            stands_still = self._clock_s - self._since_s > self._timeout_s
            try:
                self._beat(beats)
            except dist.DistError as error:
                abort(f"{self._who()} leaves: {_state_of_store(error)}", FAILED)
            except TimeoutError as error:
                if stands_still:
                    abort(f"{self._stillness()}\n{_state_of_store(error)}", FAILED)
            if stands_still and failed_at_s == math.inf:
                failed_at_s = self._clock_s
                self._fail(self._stillness(), f"no progress for {self._timeout_s:g} s", FAILED, where_ranks_are)
            if self._clock_s - failed_at_s > LAST_WORDS_S:
                abort(f"{self._who()} leaves", FAILED)

    def _beat(self, beats: int) -> None:
        roll_call = self._connected()
        frame = sys._current_frames()[self._worker]
        location = f"{self._place}, in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
        roll_call.sign(Heartbeat(beats, self._name, location))
        end = roll_call.ended()
        if end is not None:
            stack = f"\n{self._who()} is in\n{self._stack()}" if end.stacks else ""
            abort(f"{self._who()} leaves: {end.text}{stack}", end.code)

    def _connected(self) -> HeartbeatStore:
        """Return the roll call; a rank that ends before its first beat joins it only to say that it has finished."""
        if self._roll_call is None:
            self._roll_call = HeartbeatStore(self._connect(self._timeout_s), self._mesh.rank, self._mesh.num_ranks)
        return self._roll_call

    def _fail(self, text: str, reason: str, code: int, look: Look) -> None:
        """Say what happened; the first to fail also looks at the others, tells all ranks, and leaves."""
        roll_call = self._roll_call
        if roll_call is None:
            abort(text, code)
        try:
            if not roll_call.is_first_to_fail():
                write_stderr(f"{self._who()} failed, too: {reason}")
                return
        except LOST as error:
            abort(f"{text}\n{_state_of_store(error)}", code)
        write_stderr(text)
        try:
            before = roll_call.signs()
            time.sleep(LOOK_S)
            seen = "\n".join(look(before, roll_call.signs(), self._mesh.rank))
            self._over.set()
            stacks = look is where_ranks_are  # where ranks wait for one that stands still, all stacks tell
            roll_call.end(Shutdown(f"{self._who()} failed first: {reason}\n{seen}".rstrip(), code, stacks))
            if stacks:
                time.sleep(2 * BEAT_S)  # the others look every beat; when this rank leaves, their collectives break
        except LOST as error:
            seen = _state_of_store(error)
        abort(seen or f"{self._who()} leaves", code)

    def _stillness(self) -> str:
        slow = "If it was only slow, raise parallel.timeout_s"
        return f"{self._who()} has made no progress for {self._timeout_s:g} s. {slow}. It is in\n{self._stack()}"

    def _stack(self) -> str:
        """Stacks of all threads but this one, the one that trains last."""
        frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()}
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        others = [
            f"  thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame, _THREAD_FRAMES))}"
            for ident, frame in frames.items()
            if ident != self._worker
        ]
        return "".join([*others, *traceback.format_stack(frames[self._worker])]).rstrip()

    def _who(self) -> str:
        return f"{self._name}, at {self._place},"


def _state_of_store(error: Exception) -> str:
    state = "does not answer" if isinstance(error, TimeoutError) else f"is gone ({error})"
    return f"the store of the launch, with rank 0 or its launcher, {state}"
