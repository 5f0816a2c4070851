"""One run at a time in a folder: its processes hold a lock together, which ends with them.

Over NFS the kernel makes it a lock of the server's, which holds for all hosts (flock(2), since Linux 2.6.12). File
systems that have no locks go without.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megatron_bipe.errors import DataError

LOCK_NAME = "lock"
LOCK_WAIT_S = 10.0  # for processes of a killed run to be gone


@contextmanager
def locked(folder: Path, begin: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a folder together with the other processes of this run; the last to leave removes it if it is empty.

    Args:
        folder: made if need be.
        begin: done first, while no other process holds the folder.

    Raises:
        DataError: another run is at work here, or there can be no folder.
    """
    stream = _open(folder, fcntl.LOCK_EX if begin else fcntl.LOCK_SH)
    try:
        if begin:
            begin()
            if not _lock(stream, fcntl.LOCK_SH):
                raise _busy(folder)
        yield
    finally:
        with suppress(OSError):  # others may be leaving too
            if [path.name for path in folder.iterdir()] == [LOCK_NAME] and _lock(stream, fcntl.LOCK_EX):
                (folder / LOCK_NAME).unlink()
        stream.close()
        with suppress(OSError):
            folder.rmdir()  # if nothing is left in it


def _open(folder: Path, kind: int) -> IO[str]:
    until_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            what = f"The output cannot be written: {error.strerror}"
            raise DataError(what, remedy="Mend it: a file is in the way", location=folder.parent) from error
        with suppress(FileNotFoundError):  # a run that has ended removed the folder just now
            stream = (folder / LOCK_NAME).open("a+")  # over NFS, a shared lock needs reading
            if _lock(stream, kind) and os.fstat(stream.fileno()).st_nlink:  # and that run did not remove the file
                return stream
            stream.close()
        if time.monotonic() > until_s:
            raise _busy(folder)
        time.sleep(0.1)


def _lock(stream: IO[str], kind: int) -> bool:
    """Whether the lock could be had, or there are none."""
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _busy(folder: Path) -> DataError:
    return DataError(
        "Another run is writing to this folder",
        remedy="Wait for it or stop it, or name another folder",
        location=folder.parent,
    )
