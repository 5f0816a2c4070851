"""Ends a rank whose launcher has died.

A launcher that is killed by SIGKILL cannot end its ranks, and they would continue unnoticed. DeepSpeed's launcher is
two processes, `deepspeed` and `deepspeed.launcher.launch`, and the first one does not forward signals. So each rank
checks every second that the launchers among its ancestors are alive.

Only ancestors that are known launchers count. Shells, `nohup`, `ssh`, containers and batch systems may start a rank or
a launcher and end on purpose (decision 0023). A rank with a stop request continues until it has saved: a signal to the
process group, as from the supervisor, also ends `deepspeed` at once.
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

from megatron_bipe.errors import FAILED

LOOK_S = 1.0
_DEEPSPEED_OF_HOST = "deepspeed.launcher.launch"  # starts the ranks of a host
_NAMES = {
    *("deepspeed", "ds", "deepspeed.launcher.runner", _DEEPSPEED_OF_HOST),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
    *("mpiexec", "mpirun", "orterun", "orted", "prterun", "prte", "prted", "mpiexec.hydra", "hydra_pmi_proxy"),
}
_NUM_WORDS = 4  # words of a command line that may be the name, as in: python -u -m NAME
_SET_BY_DEEPSPEED = "CROSS_RANK"  # variable in the environment of ranks
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
    """Start to watch the launchers of this process, if it has any; call it from the main thread.

    Args:
        is_importing: also let the kernel kill this process with its parent (Linux), until the next call without it: the
            watch is a thread, which cannot run while a library is being loaded.
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
    launchers = []
    for process in psutil.Process().parents():
        try:
            names = [PurePath(word).name for word in process.cmdline()[:_NUM_WORDS]]
        except psutil.Error:  # it has ended, or belongs to another user
            continue
        launchers += [_Launcher(name, process) for name in names if name in _NAMES][:1]
    return launchers


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
        if readable and _STOP_SIGNALS.intersection(os.read(signals, 1024)):
            return
        if ended:  # since the last check: a stop signal that ended it has also reached this process by now
            _end_rank(f"its launcher {ended[0].name} (process {ended[0].process.pid}) has ended without it")
        ended = [launcher for launcher in launchers if launcher.has_ended()]


def _set_parent_death_signal(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _end_rank(reason: str) -> NoReturn:
    name = f"rank {os.environ.get('RANK', '?')} on {socket.gethostname()} (process {os.getpid()})"
    try:
        sys.stderr.write(f"{name} leaves: {reason}\n")
        sys.stderr.flush()
    finally:  # the output may be a pipe that ended with the launcher
        os._exit(FAILED)
