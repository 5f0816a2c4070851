"""Files and folders: atomic writes, fsync, checksums, locks, and the limit on open files."""

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

PARTIAL_SUFFIX = ".partial"  # appended to the name of a file that is still being written
LOCK_NAME = "lock"
LOCK_WAIT_S = 10.0  # time for the processes of a killed run to exit


def sync(path: Path) -> None:
    """Fsync a file or a folder. Without it, a power failure may undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def partial_path(path: Path) -> Path:
    """Return the temporary name under which `path` is written, in the same folder so that the rename is atomic."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex.

    Raises:
        DataError: the file is missing or unreadable.
    """
    try:
        return sha256(path)
    except OSError as error:
        raise unreadable_error(path, error) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees all of it or none, even after a crash."""
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
    """Raise this process's soft limit on open files by `count`, at most to the hard limit; never lower it.

    The default soft limit (often 1024) only protects programs that use select(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = soft + count
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def unreadable_error(path: Path, error: OSError) -> DataError:
    """Return the error for a file that is missing or cannot be opened."""
    if isinstance(error, FileNotFoundError):
        what, remedy = "the file is missing", "Copy the complete dataset again, or make it again"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        what, remedy = "too many files are open", "Raise the limit (ulimit -n), or make the dataset with larger shards"
    else:
        what, remedy = f"the file cannot be read: {error.strerror or error}", "Check its type and permissions"
    return DataError(what, remedy=remedy, location=path)


@contextmanager
def locked(folder: Path, begin: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock on a folder that all processes of this run share; the last one to leave removes an empty folder.

    The lock is released when its processes end. Over NFS, the kernel turns it into a lock on the server, which holds
    for all hosts (flock(2), since Linux 2.6.12). On file systems without locks, nothing is locked.

    Args:
        folder: folder to lock; created if it does not exist.
        begin: called first, while no other process holds the lock.

    Raises:
        DataError: another run holds the lock, or the folder cannot be created.
    """
    stream = _open(folder, fcntl.LOCK_EX if begin else fcntl.LOCK_SH)
    try:
        if begin:
            begin()
            if not _lock(stream, fcntl.LOCK_SH):
                raise _busy(folder)
        yield
    finally:
        with suppress(OSError):  # other processes may be leaving at the same time
            if [path.name for path in folder.iterdir()] == [LOCK_NAME] and _lock(stream, fcntl.LOCK_EX):
                (folder / LOCK_NAME).unlink()
        stream.close()
        with suppress(OSError):
            folder.rmdir()  # succeeds only if it is empty


def _open(folder: Path, kind: int) -> IO[str]:
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            what = f"The output cannot be written: {error.strerror}"
            remedy = "Remove the file that prevents creating a folder here"
            raise DataError(what, remedy=remedy, location=folder.parent) from error
        with suppress(FileNotFoundError):  # a run that has just ended removed the folder
            stream = (folder / LOCK_NAME).open("a+")  # over NFS, a shared lock needs read access
            if _lock(stream, kind) and os.fstat(stream.fileno()).st_nlink:  # else that run removed the lock file
                return stream
            stream.close()
        if time.monotonic() > deadline_s:
            raise _busy(folder)
        time.sleep(0.1)


def _lock(stream: IO[str], kind: int) -> bool:
    """Return True if the lock was acquired or the file system has no locks."""
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
        remedy="Wait for it to end, stop it, or name another folder",
        location=folder.parent,
    )
