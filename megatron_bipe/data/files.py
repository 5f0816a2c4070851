"""Writing that survives a crash, and checksums: what every file of a dataset is put down with."""

import errno
import os
import resource
from pathlib import Path

from megatron_bipe.disk import sha256, sync
from megatron_bipe.errors import DataError

PARTIAL_SUFFIX = ".partial"  # of a name that is still being written


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
