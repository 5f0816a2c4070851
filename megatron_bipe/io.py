"""Files and folders on disk: atomic writes, fsync, checksums, locks, and the limit of open files."""

import errno
import fcntl
import hashlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megatron_bipe.errors import DataError

PARTIAL_SUFFIX = ".partial"  # of a name that is still being written
LOCK_NAME = "lock"
LOCK_WAIT_S = 10.0  # for processes of a killed run to be gone


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes or a folder's entries; a rename alone may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def partial_path(path: Path) -> Path:
    """The temporary name that `path` is written under, in the same folder so that renaming is atomic."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        DataError: the file is missing or unreadable.
    """
    try:
        return sha256(path)
    except OSError as error:
        raise unreadable(path, error) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, or a crash, sees all of it or none."""
    partial = partial_path(path)
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def allow_open_files(count: int) -> None:
    """Raise this process's limit on open files by `count`, as far as the system lets it; never lowers it.

    The limit that processes start with (often 1024) is meant for programs that wait for many files at once; the one
    that they may raise it to is the real one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = soft + count
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def unreadable(path: Path, error: OSError) -> DataError:
    """The one message for a file that is not there or cannot be opened."""
    if isinstance(error, FileNotFoundError):
        what, remedy = "the file is missing", "Copy the dataset again in full, or make it again"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        what, remedy = "too many files are open", "Raise the limit (ulimit -n), or make the dataset with larger shards"
    else:
        what, remedy = f"the file cannot be read: {error.strerror or error}", "Check its type and permissions"
    return DataError(what, remedy=remedy, location=path)


@contextmanager
def locked(folder: Path, begin: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock on a folder together with the other processes of this run; the last to leave removes an empty folder.

    The lock ends with its processes. Over NFS the kernel makes it a lock of the server's, which holds for all hosts
    (flock(2), since Linux 2.6.12). File systems that have no locks go without.

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
