"""Messages of a rank: its log, and its exit after an error, at once and with a message that names the rank."""

import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, TypeVar

from megatron_bipe.errors import BipeError, as_user_error, exit_code
from megatron_bipe.runtime.child_processes import record_failure, watch_launcher
from megatron_bipe.runtime.distributed_init import find_launch
from megatron_bipe.runtime.launcher_env import Launch

if TYPE_CHECKING:
    from megatron_bipe.parallel import Mesh

import logging

Arguments = TypeVar("Arguments")

_HEAD_START_S = 3  # launchers kill all ranks when one exits; the main rank must report first
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")  # files in which an operation with other ranks fails
_LOST = re.compile(r"connection|peer|remote|socket|timed out|broken pipe|nccl", re.IGNORECASE)
_SOURCE = re.compile(r"^\[[^]]*:\d+\] ")  # gloo begins its messages with the location in its source
_BRIEF_LINES = 4
_OUT_OF_MEMORY = "OutOfMemoryError"  # of torch, which this module does not import
_MEMORY_REMEDY = (
    "The GPU has too little memory for this run. Lower train.micro_batch, or set parallel.recompute=selective or full; "
    "--dry-run estimates the memory of each rank."
)


def run_rank(main: Callable[[Arguments, Launch], None], arguments: Arguments) -> None:
    """Find the launch and run `main` on this rank; an error ends the process.

    An error that the user can fix usually occurs on all ranks. The main rank reports it; another rank that is still
    alive after a delay had an error of its own, and reports that.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins, Ctrl-C ends this process without a traceback
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

    A collective that has lost its connection shows only that another rank has ended, so it becomes one line, too.

    Args:
        error: the exception.
        name: name and location of the rank.
    """
    user_error = as_user_error(error)
    if isinstance(user_error, BipeError):
        return f"{type(user_error).__name__}: {user_error}" + (f"  ({name})" if name else "")
    if _is_lost_connection(error):
        return f"{name} lost the connection to another rank: {one_line(error)}"
    trace = "".join(traceback.format_exception(error)).rstrip()
    return f"{name} failed:\n{trace}" + (f"\n{_MEMORY_REMEDY}" if type(error).__name__ == _OUT_OF_MEMORY else "")


def _is_lost_connection(error: BaseException) -> bool:
    """Return True if a collective failed because another rank has ended or cannot be reached."""
    frames = traceback.extract_tb(error.__traceback__)
    is_collective = bool(frames) and any(part in frames[-1].filename for part in _COLLECTIVES)
    return is_collective and _LOST.search(str(error)) is not None


def one_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    error = as_user_error(error)
    line = _SOURCE.sub("", next(iter(str(error).strip().splitlines()), ""))
    return f"{type(error).__name__}: {line.partition('. This is typically')[0]}".rstrip(": ")


def brief(text: str) -> str:
    """Shorten the report of an error to a few lines; of a traceback, its last line remains."""
    lines = text.strip().splitlines()
    if any(line.startswith("Traceback") for line in lines):
        return f"{lines[0]} {lines[-1]}"
    return "\n".join(lines[:_BRIEF_LINES])


def write_stderr(text: str) -> None:
    """Write a message to stderr in one call, so that those of several ranks do not mix; ignore a closed pipe."""
    with suppress(BrokenPipeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def abort(text: str, code: int, cause: str = "") -> NoReturn:
    """Print a message and end the process at once: a normal exit would wait for threads that wait for other ranks.

    Args:
        text: message to print.
        code: exit code.
        cause: what a supervisor of this launch repeats, if this rank is the first one to call this; "": the message.
    """
    record_failure(brief(cause or text), code)
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
