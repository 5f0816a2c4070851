"""Child processes that do not outlive this process.

A command gets its own process group, so that one signal reaches it and everything it starts. A second process, the
guard, reads a pipe from this process. If this process ends without having ended the group, even by SIGKILL, the pipe
closes, and the guard ends the group. The kernel's parent-death signal (PR_SET_PDEATHSIG) is not enough: it reaches the
command only, not what the command starts, and it fires when the forking thread ends, not the process.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import parent_process
from typing import Any

GRACE_S = 6  # from SIGTERM to SIGKILL: enough to save a small model, and all end within 10 seconds
_POLL_S = 0.05

# The first line is the id of the group, written by the command's process before it executes the command; the second one
# is sent after the group has ended. End of file instead of a line means that the writer has died.
_GUARD = f"""
read -r group || exit 0
read -r ended && exit 0
kill -s TERM -- "-$group" || exit 0
for second in {" ".join(map(str, range(GRACE_S)))}; do kill -s 0 -- "-$group" || exit 0; sleep 1; done
kill -s KILL -- "-$group"
"""


class ChildProcess:
    """A running command with its process group; leaving the context ends all processes of the group.

    Args:
        command: program and arguments.
        env: environment variables in addition to those of this process.
        options: further arguments of `subprocess.Popen`.

    Raises:
        OSError: the command cannot be started.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> None:
        null = subprocess.DEVNULL
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD], stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True
        )
        assert self._guard.stdin is not None
        pipe = self._guard.stdin.fileno()

        def name_group() -> None:  # in the command's process: this one may be killed before it could do so
            os.write(pipe, f"{os.getpid()}\n".encode())

        try:
            self.process: subprocess.Popen[Any] = subprocess.Popen(
                command, env=os.environ | (env or {}), start_new_session=True, preexec_fn=name_group, **options
            )
        except BaseException:
            self._guard.communicate()
            raise

    def __enter__(self) -> "ChildProcess":
        return self

    def __exit__(self, *_: object) -> None:
        end_all([self])

    def send(self, number: int) -> bool:
        """Send a signal to all processes of the group; return False if there are none."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def is_over(self) -> bool:
        """Return True if neither the command nor any other process of its group is left."""
        if self.process.poll() is None:
            return False
        with suppress(ChildProcessError):  # as process 1 of a container, reap orphans
            while os.waitpid(-self.process.pid, os.WNOHANG)[0]:
                pass
        return not self.send(0)

    def kill(self) -> None:
        """Kill the remaining processes, and end the guard."""
        self.send(signal.SIGKILL)
        self.process.wait()
        if self._guard.returncode is None:
            assert self._guard.stdin is not None
            with suppress(BrokenPipeError):  # the guard was killed
                self._guard.stdin.write(b"ended\n")
                self._guard.stdin.flush()
            self._guard.communicate()


def end_all(children: Sequence[ChildProcess], grace_s: float = GRACE_S) -> None:
    """Send SIGTERM to all groups, and SIGKILL after `grace_s` or when interrupted."""
    try:
        for child in children:
            if not child.is_over():
                child.send(signal.SIGTERM)
        deadline_s = time.monotonic() + grace_s
        while not all(child.is_over() for child in children) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
    finally:
        for child in children:
            child.kill()


def run_command(
    command: Sequence[str], *, stdin_text: str | None = None, check: bool = False, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a command like `subprocess.run` in text mode; it does not outlive this process."""
    if stdin_text is not None:
        options["stdin"] = subprocess.PIPE
    with ChildProcess(command, text=True, **options) as child:
        output, errors = child.process.communicate(stdin_text)
    done = subprocess.CompletedProcess(list(command), child.process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT and SystemExit on SIGTERM, so that `with` and `finally` end child processes.

    By default, a process that a script starts in the background ignores SIGINT and dies of SIGTERM at once.
    """
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: lambda number, _: sys.exit(128 + number)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_with_parent() -> None:
    """End this process, which `multiprocessing` started, when its parent ends."""
    threading.Thread(target=_leave_with_parent, name="parent watch", daemon=True).start()


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
