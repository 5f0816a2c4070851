"""Child processes that do not outlive this process, and ranks that do not outlive their launcher.

A command gets its own process group, so that one signal reaches it and everything it starts. A second process, the
guard, reads a pipe from this process. If this process ends without having ended the group, even by SIGKILL, the pipe
closes, and the guard ends the group. The kernel's parent-death signal (PR_SET_PDEATHSIG) is not enough: it reaches the
command only, not what the command starts, and it fires when the forking thread ends, not the process.

A launcher that is killed by SIGKILL cannot end its ranks, and they would continue unnoticed. DeepSpeed's launcher is
two processes, `deepspeed` and `deepspeed.launcher.launch`, and the first one does not forward signals. So each rank
checks every second that the launchers among its ancestors are alive.

Only ancestors that are known launchers count. Shells, `nohup`, `ssh`, containers and batch systems may start a rank or
a launcher and end on purpose (decision 0023). A rank that has received a stop signal no longer checks its launchers, so
that it can save: if the signal was sent to the process group, as by a terminal, it also ended `deepspeed` at once.
"""

import ctypes
import functools
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import parent_process
from pathlib import PurePath
from typing import Any, NamedTuple, NoReturn

import psutil

from megatron_bipe.errors import FAILED
from megatron_bipe.runtime.environment import FAILURE_FILE

GRACE_S = 6  # from SIGTERM to SIGKILL: enough to save a small model; all processes end within 10 seconds
_POLL_S = 0.05
_NOTED_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# The guard reads two lines. The first is the id of the group, written by the command's process before it executes the
# command; the second is sent after the group has ended. End of file instead of a line means that the writer has died.
_GUARD = f"""
read -r group || exit 0
read -r ended && exit 0
kill -s TERM -- "-$group" || exit 0
for second in {" ".join(map(str, range(GRACE_S)))}; do kill -s 0 -- "-$group" || exit 0; sleep 1; done
kill -s KILL -- "-$group"
"""

LOOK_S = 1.0  # between two checks of the launchers
_DEEPSPEED_OF_HOST = "deepspeed.launcher.launch"  # starts the ranks of a host
_DEEPSPEED_NAMES = {"deepspeed", "ds", "deepspeed.launcher.runner", _DEEPSPEED_OF_HOST}
_LAUNCHER_NAMES = {
    *_DEEPSPEED_NAMES,
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
    *("mpiexec", "mpirun", "orterun", "orted", "prterun", "prte", "prted", "mpiexec.hydra", "hydra_pmi_proxy"),
}
_NUM_WORDS = 4  # words of a command line that may be the name, as in: python -u -m NAME
_SET_BY_DEEPSPEED = "CROSS_RANK"  # variable in the environment of ranks
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)  # they ask a rank to save and exit
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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

        def name_group() -> None:  # runs in the command's process: this one may be killed before it could write
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

    def ask_to_stop(self, number: int) -> None:
        """Send a signal to the processes of the group, except to launchers of DeepSpeed that have ranks on this host.

        `deepspeed.launcher.launch` kills its ranks 30 seconds after SIGTERM, and `deepspeed` exits at once. Without the
        signal both wait for the ranks, however long these take to save, and pass on their exit code.
        """
        group = [(process, _launcher_name(process)) for process in self._members()]
        has_ranks = any(name == _DEEPSPEED_OF_HOST and process.children() for process, name in group)
        if not has_ranks:
            self.send(number)
            return
        for process, name in group:
            if name not in _DEEPSPEED_NAMES:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def is_over(self) -> bool:
        """Return True if neither the command nor any other process of its group is left.

        Zombies do not count: orphans stay zombies in a container whose process 1 does not reap them.
        """
        if self.process.poll() is None:
            return False
        with suppress(ChildProcessError):  # as process 1 of a container, reap orphans
            while os.waitpid(-self.process.pid, os.WNOHANG)[0]:
                pass
        return not self.send(0) or not self._members()

    def _members(self) -> list[psutil.Process]:
        """Return the living processes of the group."""
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):  # it has just ended
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

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
    command: Sequence[str],
    *,
    stdin_text: str | None = None,
    check: bool = False,
    timeout_s: float | None = None,
    **options: Any,
) -> "subprocess.CompletedProcess[str]":
    """Run a command like `subprocess.run` in text mode; it does not outlive this process."""
    if stdin_text is not None:
        options["stdin"] = subprocess.PIPE
    with ChildProcess(command, text=True, **options) as child:
        output, errors = child.process.communicate(stdin_text, timeout_s)
    done = subprocess.CompletedProcess(list(command), child.process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


@contextmanager
def signals_noted() -> Iterator[Callable[[], None]]:
    """Give a function that raises KeyboardInterrupt after SIGINT and SystemExit after SIGTERM; it is called at the end.

    Call it regularly, so that `with` and `finally` end child processes. By default, a process that a script starts in
    the background ignores SIGINT, and dies of SIGTERM at once. A handler that raises would not do: while Python forks,
    it runs functions such as those of `os.register_at_fork`, in which it ignores exceptions.
    """
    noted: list[int] = []
    before = {number: signal.signal(number, lambda seen, _: noted.append(seen)) for number in _NOTED_SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def check() -> None:
        if noted:
            restore()  # a second Ctrl-C interrupts the clean-up
            if noted[0] == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + noted[0])

    try:
        yield check
        check()
    finally:
        restore()


def leave_with_parent() -> None:
    """End this process, which `multiprocessing` started, when its parent ends."""
    threading.Thread(target=_leave_with_parent, name="parent watch", daemon=True).start()


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Launcher(NamedTuple):
    name: str
    process: psutil.Process

    def has_ended(self) -> bool:
        try:
            return not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def watch_launcher(*, is_importing: bool = False) -> None:
    """Start to watch the launchers of this process, if it has any; call it from the main thread.

    Args:
        is_importing: also let the kernel kill this process with its parent (Linux), until the next call without this
            argument: the watch is a thread, which cannot run while a library is being loaded.
    """
    launchers = _start()
    is_child_of_one = any(launcher.process.pid == os.getppid() for launcher in launchers)
    _set_parent_death_signal(signal.SIGKILL if is_importing and is_child_of_one else 0)


@functools.cache  # one watch per process
def _start() -> Sequence[_Launcher]:
    launchers = _find_launchers()
    starters = [launcher.process.pid for launcher in launchers if launcher.name == _DEEPSPEED_OF_HOST]
    if any(map(_is_orphan, [*starters, *([os.getpid()] if _SET_BY_DEEPSPEED in os.environ else [])])):
        _end_rank("deepspeed ended while it was starting this rank")
    if launchers:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # reports signals even if the main thread is busy
        threading.Thread(target=_watch, args=(launchers, reader), name="launcher watch", daemon=True).start()
    return launchers


def _find_launchers() -> list[_Launcher]:
    named = [_Launcher(_launcher_name(process), process) for process in psutil.Process().parents()]
    return [launcher for launcher in named if launcher.name]


def _launcher_name(process: psutil.Process) -> str:
    """Return the name of a known launcher; "" for another process."""
    try:
        names = [PurePath(word).name for word in process.cmdline()[:_NUM_WORDS]]
    except psutil.Error:  # it has ended, or belongs to another user
        return ""
    return next((name for name in names if name in _LAUNCHER_NAMES), "")


def _is_orphan(pid: int) -> bool:
    """Return True if a process that DeepSpeed started has lost its parent.

    Both are in one process group, so a parent in another group did not start it. A process that leads its group was
    started by something else, such as the shell of a remote host.
    """
    try:
        group = os.getpgid(pid)
        return group != pid and os.getpgid(psutil.Process(pid).ppid()) != group
    except (ProcessLookupError, psutil.NoSuchProcess):
        return True


def _watch(launchers: Sequence[_Launcher], signals: int) -> None:
    ended: list[_Launcher] = []
    while True:
        readable, _, _ = select.select([signals], [], [], LOOK_S)
        if readable and set(STOP_SIGNALS).intersection(os.read(signals, 1024)):
            return
        if ended:  # found at the last check: a stop signal that ended it would have arrived here by now
            _end_rank(f"its launcher {ended[0].name} (process {ended[0].process.pid}) has ended without it")
        ended = [launcher for launcher in launchers if launcher.has_ended()]


def _set_parent_death_signal(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _end_rank(reason: str) -> NoReturn:
    name = f"rank {os.environ.get('RANK', '?')} on {socket.gethostname()} (process {os.getpid()})"
    record_failure(f"{name} leaves: {reason}", FAILED)
    try:
        sys.stderr.write(f"{name} leaves: {reason}\n")
        sys.stderr.flush()
    finally:  # the output may be a pipe that ended with the launcher
        os._exit(FAILED)


def record_failure(text: str, code: int) -> None:
    """Append why and with which code this rank exits to the file of the supervisor, if there is one on this host."""
    with suppress(KeyError, OSError):
        file = os.open(os.environ[FAILURE_FILE], os.O_WRONLY | os.O_APPEND)
        os.write(file, f"{code} {text}\0".encode())
