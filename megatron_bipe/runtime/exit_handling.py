"""Messages of a rank: its log, and its exit after an error, at once and with a message that names the rank."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, TypeVar

from megatron_bipe.errors import BipeError, as_user_error, exit_code
from megatron_bipe.runtime.child_processes import watch_launcher
from megatron_bipe.runtime.distributed_init import find_launch
from megatron_bipe.runtime.launcher_env import Launch

if TYPE_CHECKING:
    from megatron_bipe.parallel import Mesh

import logging

Arguments = TypeVar("Arguments")

_HEAD_START_S = 3  # launchers kill all ranks when one exits; the main rank must report first


def run_rank(main: Callable[[Arguments, Launch], None], arguments: Arguments) -> None:
    """Find the launch and run `main` on this rank; an error ends the process.

    An error that the user can fix usually occurs on all ranks. The main rank reports it; another rank that is still
    alive after a delay had an error of its own, and reports that.
    """
    watch_launcher(is_importing=True)
    launch = None
    try:
        launch = find_launch()
        main(arguments, launch)
    except Exception as error:
        if launch is not None and not launch.is_main and isinstance(as_user_error(error), BipeError):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # let the launcher end this rank now
            time.sleep(_HEAD_START_S)
        abort(describe(error, rank_name(launch) if launch else ""), exit_code(error))


def rank_name(mesh: "Mesh | Launch") -> str:
    """Return the rank and its host, for messages."""
    return f"rank {mesh.rank} of {mesh.num_ranks} on {socket.gethostname()}"


def layout_coordinates(mesh: "Mesh") -> str:
    """Return the coordinates of a rank in the parallel layout, for messages."""
    return f"stage {mesh.stage}, data {mesh.data_rank}, context {mesh.context_rank}, tensor {mesh.tensor_rank}"


def describe(error: BaseException, name: str) -> str:
    """Return the text that reports an error: its message if the user can fix it, else a traceback.

    Args:
        error: the exception.
        name: name and location of the rank.
    """
    user_error = as_user_error(error)
    if isinstance(user_error, BipeError):
        return f"{type(user_error).__name__}: {user_error}" + (f"  ({name})" if name else "")
    return f"{name} failed:\n{''.join(traceback.format_exception(error)).rstrip()}"


def summarize(error: BaseException) -> str:
    """Return the type and the first line of the message of an error."""
    error = as_user_error(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")


def write_stderr(text: str) -> None:
    """Write a message to stderr in one call, so that those of several ranks do not mix; ignore a closed pipe."""
    with suppress(BrokenPipeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def abort(text: str, code: int) -> NoReturn:
    """Print a message and end the process at once: a normal exit would wait for threads that wait for other ranks."""
    try:
        sys.stdout.flush()
        write_stderr(text)
    finally:  # both fail if the output was a pipe of a launcher that has ended
        os._exit(code)


class _RankFormatter(logging.Formatter):
    """Formatter for `2026-11-28 16:40:07Z rank 0 message`, with the level before the message from WARNING on."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"%(asctime)sZ rank {rank} %(level)s%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        record.level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        return super().format(record)


def log_to_stderr(rank: int) -> None:
    """Send this process's log to stderr: INFO on rank 0, WARNING on the others."""
    handler = logging.StreamHandler()
    handler.setFormatter(_RankFormatter(rank))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler])
