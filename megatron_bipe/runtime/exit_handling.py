"""How a rank leaves that cannot go on: at once, and with a word on who it is."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, TypeVar

from megatron_bipe.errors import BipeError
from megatron_bipe.runtime.distributed_init import find_launch
from megatron_bipe.runtime.launcher_env import Launch
from megatron_bipe.runtime.launcher_watch import watch_launcher

if TYPE_CHECKING:
    from megatron_bipe.parallel.mesh import Mesh

Arguments = TypeVar("Arguments")

FAILED, USER_ERROR = 1, 2  # exit codes
_HEAD_START_S = 3  # launchers kill all ranks when one leaves; the main one must have spoken by then


def run_rank(main: Callable[[Arguments, Launch], None], arguments: Arguments) -> None:
    """Find the launch and do a rank's work; an error ends the process.

    An error that the user can fix is most often one of all ranks. The main one tells it; another, if it still lives
    after a while, had one of its own.
    """
    watch_launcher(is_importing=True)
    launch = None
    try:
        launch = find_launch()
        main(arguments, launch)
    except Exception as error:
        if launch is not None and not launch.is_main and isinstance(error, BipeError):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's end is welcome now
            time.sleep(_HEAD_START_S)
        abort(describe(error, rank_name(launch) if launch else ""), exit_code(error))


def rank_name(mesh: "Mesh | Launch") -> str:
    """A rank and its host, for messages."""
    return f"rank {mesh.rank} of {mesh.num_ranks} on {socket.gethostname()}"


def layout_coordinates(mesh: "Mesh") -> str:
    """What a rank has of the model and of the data, for messages; of a mesh that is laid out."""
    return f"stage {mesh.stage}, data {mesh.data_rank}, context {mesh.context_rank}, tensor {mesh.tensor_rank}"


def describe(error: BaseException, name: str) -> str:
    """What is said of an error: a message where the user can fix it, else a traceback.

    Args:
        error: what was raised.
        name: of the rank, and where it was.
    """
    if isinstance(error, BipeError):
        return f"{type(error).__name__}: {error}" + (f"  ({name})" if name else "")
    return f"{name} failed:\n{''.join(traceback.format_exception(error)).rstrip()}"


def exit_code(error: BaseException) -> int:
    """2 where the user can fix it, else 1."""
    return USER_ERROR if isinstance(error, BipeError) else FAILED


def write_stderr(text: str) -> None:
    """Put a message on stderr in one piece, so that those of several ranks do not mix; a closed pipe is no error."""
    with suppress(BrokenPipeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def abort(text: str, code: int) -> NoReturn:
    """Say something and end the process at once: Python's own end would wait for threads that wait for other ranks."""
    try:
        sys.stdout.flush()
        write_stderr(text)
    finally:  # both fail where the output went through a pipe of a launcher that is gone
        os._exit(code)
