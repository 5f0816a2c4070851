"""Ends a rank whose launcher is gone.

A launcher that is killed by SIGKILL cannot end its ranks, and they would train on unnoticed. DeepSpeed's is two
processes, `deepspeed` and `deepspeed.launcher.launch`, and the first one does not pass signals on. So each rank checks
every second that the launchers among its ancestors still run.

Only ancestors that are known launchers count. Shells, `nohup`, `ssh`, containers and batch systems may start a rank or
a launcher and end on purpose (decision 0023). A rank that was asked to stop stays until it has saved: whoever signals
a whole process group, as the supervisor does, ends `deepspeed` in the same moment.
"""

import ctypes
import functools
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple, NoReturn

import psutil

LOOK_S = 1.0
FAILED = 1  # exit code
_DEEPSPEED_OF_HOST = "deepspeed.launcher.launch"  # starts the ranks of its host
_NAMES = {
    *("deepspeed", "ds", "deepspeed.launcher.runner", _DEEPSPEED_OF_HOST),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
    *("mpiexec", "mpirun", "orterun", "orted", "prterun", "prte", "prted", "mpiexec.hydra", "hydra_pmi_proxy"),
}
_NUM_WORDS = 4  # of a command line that may hold the name, as in: python -u -m NAME
_SET_BY_DEEPSPEED = "CROSS_RANK"  # variable of ranks
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Launcher(NamedTuple):
    name: str
    process: psutil.Process

    def has_ended(self) -> bool:
        try:
            return not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def watch_launcher(*, is_importing: bool = False) -> None:
    """Watch the launchers of this process from now on, if it has any; to be called from the main thread.

    Args:
        is_importing: let the kernel kill this process with its parent as well (Linux), until the next call without it:
            the watch is a thread, which cannot run while a library is being loaded.
    """
    launchers = _start()
    is_child_of_one = any(launcher.process.pid == os.getppid() for launcher in launchers)
    _set_parent_death_signal(signal.SIGKILL if is_importing and is_child_of_one else 0)


@functools.cache  # one watch for a process
def _start() -> Sequence[_Launcher]:
    launchers = _find_launchers()
    starters = [launcher.process.pid for launcher in launchers if launcher.name == _DEEPSPEED_OF_HOST]
    if any(map(_is_orphan, [*starters, *([os.getpid()] if _SET_BY_DEEPSPEED in os.environ else [])])):
        _leave("deepspeed ended while it was starting this rank")
    if launchers:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # tells of signals even if the main thread is busy
        threading.Thread(target=_watch, args=(launchers, reader), name="launcher watch", daemon=True).start()
    return launchers


def _find_launchers() -> list[_Launcher]:
    launchers = []
    for process in psutil.Process().parents():
        try:
            names = [PurePath(word).name for word in process.cmdline()[:_NUM_WORDS]]
        except psutil.Error:  # it has just ended, or belongs to another user
            continue
        launchers += [_Launcher(name, process) for name in names if name in _NAMES][:1]
    return launchers


def _is_orphan(pid: int) -> bool:
    """Return True if a process that DeepSpeed started has lost its parent.

    Both are in one process group, so that a parent in another one is not the process that started it. A process that
    leads its group was started by something else, such as the shell of a remote host.
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
        if readable and _STOP_SIGNALS.intersection(os.read(signals, 1024)):
            return
        if ended:  # a look ago: a signal to stop that ended it has reached this process, too, by now
            _leave(f"its launcher {ended[0].name} (process {ended[0].process.pid}) has ended without it")
        ended = [launcher for launcher in launchers if launcher.has_ended()]


def _set_parent_death_signal(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _leave(reason: str) -> NoReturn:
    name = f"rank {os.environ.get('RANK', '?')} on {socket.gethostname()} (process {os.getpid()})"
    try:
        sys.stderr.write(f"{name} leaves: {reason}\n")
        sys.stderr.flush()
    finally:  # a launcher that relayed the output took its end of the pipe along
        os._exit(FAILED)
