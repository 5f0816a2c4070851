"""Files and folders: atomic writes, fsync, checksums, locks, and the limit on open files."""

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, TypeVar

from megatron_bipe.errors import DataError, is_transient, writing

PARTIAL_SUFFIX = ".partial"  # appended to the name of a file that is still being written
LOCK_NAME = "lock"
HASH_THREADS = 8  # hashlib releases the GIL; more threads than this wait for the disk
LOCK_WAIT_S = 10.0  # time for the processes of a killed run to exit
READ_PAUSES_S = (0.5, 2.0, 8.0)  # before a read that failed is repeated
_CHUNK_BYTES = 1 << 22

T = TypeVar("T")
_log = logging.getLogger(__name__)


def fsync_path(path: Path) -> None:
    """Fsync a file or a folder. Without it, a power failure may undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex; raise `OSError` if it is missing or unreadable."""
    return finish(hashing(path))


def finish(steps: Generator[None, None, T]) -> T:
    """Do all steps of a work, and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def hashing(path: Path) -> Generator[None, None, str]:
    """Hash a file as `sha256_of` does, and yield after each chunk."""
    for pause_s in (*READ_PAUSES_S, math.inf):
        try:
            return (yield from _hash_once(path))
        except OSError as error:
            _pause_or_raise(error, pause_s)
    raise AssertionError


def _hash_once(path: Path) -> Generator[None, None, str]:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            yield
    return digest.hexdigest()


def read_again(read: Callable[[], T]) -> T:
    """Return what `read` returns; after an error of the disk that may pass, call it again, a few times."""
    for pause_s in (*READ_PAUSES_S, math.inf):
        try:
            return read()
        except OSError as error:
            _pause_or_raise(error, pause_s)
    raise AssertionError


def _pause_or_raise(error: OSError, pause_s: float) -> None:
    if pause_s == math.inf or not is_transient(error):
        raise error
    _log.warning("%s; reading again in %g s", error, pause_s)
    time.sleep(pause_s)


def sha256_of_all(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the SHA-256 of each file, in order, reading several at a time; raise as `sha256_of` in the file's turn."""
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        yield from pool.map(sha256_of, paths)


def check_inner_name(name: str) -> str:
    """Return a name that was read from a file, if it names something inside the folder that it is relative to.

    Every reader of names (indices, manifests, lists of checksums) calls this before it joins a name to a folder.
    Symbolic links are followed: a cache of the Hub consists of them, and whoever made one could write to the folder.

    Raises:
        ValueError: the name is empty, absolute or contains `..` or a null character.
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file inside the folder")
    return name


def partial_path(path: Path) -> Path:
    """Return the temporary name under which `path` is written, in the same folder so that the rename is atomic."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path` if the block succeeds and is removed if it fails.

    A reader of `path` sees all of the old file or all of the new one, even after a crash.
    """
    partial = partial_path(path)
    try:
        with writing(path), partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error tells more
            partial.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` as `atomic_file` does."""
    with atomic_file(path) as stream:
        stream.write(data)


def unfinished_path(path: Path) -> Path:
    """Return the folder in which `atomic_directory` works, on the same file system so that a rename is atomic."""
    return path.with_name(f".{path.name}.unfinished")


@contextmanager
def atomic_directory(
    path: Path, *, overwrite: bool = False, check: Callable[[Path], None] = lambda _: None
) -> Iterator[Path]:
    """Yield an empty draft folder that becomes `path` if the block succeeds and is removed if it fails.

    A process that is killed leaves the complete old folder or the complete new one; the next call removes its draft.
    File systems that cannot exchange two names, such as NFS, need two renames; if a process is killed between them, the
    next call restores the old folder. The draft has the name of `path`, since some files depend on it.

    Checkpoints and preprocessing do not use this function: many processes write a checkpoint, and interrupted
    preprocessing is kept and resumed.

    Args:
        path: folder to make. Its parent is created.
        overwrite: replace a folder that is not empty, with all that it holds.
        check: called with a folder that will be replaced, before the block and again after it; raises an error if the
            folder holds anything that must not be deleted.

    Raises:
        DataError: the folder is not empty and must not be replaced, another process is making it, or a foreign folder
            has the name of its draft.
        OSError: a disk operation failed.
    """
    path = path.resolve()
    work = unfinished_path(path)
    draft = work / "draft" / path.name

    def begin() -> None:
        _tidy(work, path)
        if path.exists() and not path.is_dir():
            raise DataError("The output is a file; it must be a folder", remedy="Name another", location=path)
        if path.exists() and any(path.iterdir()) and not overwrite:
            raise DataError("The output folder is not empty", remedy="Name another, or overwrite it", location=path)
        if path.exists():
            check(path)

    _require_own_draft(work, path.name)
    with locked(work, begin, output=path), writing(path):
        try:
            draft.mkdir(parents=True)
            yield draft
            for file in (*draft.rglob("*"), draft):
                fsync_path(file)
            if path.exists():
                check(path)  # something may have been added meanwhile
            if not overwrite or not path.exists():
                draft.rename(path)  # fails if the folder is no longer empty
            elif not _exchange(draft, path):
                path.rename(work / "replaced")
                draft.rename(path)
            fsync_path(path.parent)
        finally:
            _tidy(work, path)


def _require_own_draft(work: Path, name: str) -> None:
    """Raise `DataError` if another program made the folder: an interrupted run leaves its lock file and one draft."""
    drafts = {path.name for path in (work / "draft").iterdir()} if (work / "draft").is_dir() else set()
    is_foreign = bool(drafts - {name}) or (work / "replaced").exists()
    if is_foreign and not (work / LOCK_NAME).exists():
        what = f"The folder has the name of an unfinished output, but no file {LOCK_NAME!r} of such a run"
        raise DataError(what, remedy="Move it away, or name another output", location=work)


def _tidy(work: Path, path: Path) -> None:
    """Restore a folder whose replacement was interrupted, and remove drafts and replaced folders."""
    replaced = work / "replaced"
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    for leftover in (replaced, work / "draft"):
        shutil.rmtree(leftover, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders atomically, by renameat2(2); return False if it cannot be done."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "renameat2"):
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)


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
def locked(
    folder: Path,
    begin: Callable[[], None] | None = None,
    *,
    output: Path | None = None,
    job: str = "",
    progress: Callable[[], str] = str,
) -> Iterator[None]:
    """Hold a lock on a folder, shared by all processes of this run; the last one to leave removes the folder if empty.

    The lock is released when its processes end. Over NFS, the kernel turns it into a lock on the server, which holds
    for all hosts (flock(2), since Linux 2.6.12). On file systems without locks, nothing is locked.
    `filelock` does not replace it: its file lock cannot be shared, its shared lock is a SQLite database, and without
    locks it falls back to a lock file that a killed process leaves behind.

    Args:
        folder: folder to lock; created if it does not exist.
        begin: called first, while no other process holds the lock.
        output: location of errors; None: the parent of `folder`.
        job: name of this process's batch job, which an error of another run reports.
        progress: returns how far the run that holds the lock is, for the error.

    Raises:
        DataError: another run holds the lock (transient), or the folder cannot be created.
    """
    output = output or folder.parent
    stream = _open(folder, fcntl.LOCK_EX if begin else fcntl.LOCK_SH, output, progress)
    try:
        if begin:
            begin()
            _record_holder(stream, job)
            if not _lock(stream, fcntl.LOCK_SH):
                raise _busy(folder, output, progress)
        yield
    finally:
        with suppress(OSError):  # other processes may be leaving at the same time
            if [path.name for path in folder.iterdir()] == [LOCK_NAME] and _lock(stream, fcntl.LOCK_EX):
                (folder / LOCK_NAME).unlink()
        stream.close()
        with suppress(OSError):
            folder.rmdir()  # succeeds only if it is empty


def lock_holder(folder: Path) -> str:
    """Return the process that holds the lock of a folder, its host, job and start; "" if the lock is free."""
    try:
        with (folder / LOCK_NAME).open("r+") as stream:
            return "" if _lock(stream, fcntl.LOCK_EX) else _describe_holder(stream)
    except OSError:  # nothing is locked, or the launch will report why it cannot lock this
        return ""


def lock_host(folder: Path) -> str:
    """Return the host of the process that last locked a folder; "" if that is not recorded there."""
    try:
        return str(json.loads((folder / LOCK_NAME).read_bytes())["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _record_holder(stream: IO[str], job: str) -> None:
    """Replace the content of the lock file by a description of this process."""
    since = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "since": since}
    with suppress(OSError):  # the lock holds without it, also on a full disk
        stream.truncate(0)
        os.write(stream.fileno(), json.dumps(holder).encode())  # a buffer would fail again when it is closed


def _describe_holder(stream: IO[str]) -> str:
    try:
        stream.seek(0)
        holder = json.load(stream)
        job = f" ({holder['job']})" if holder["job"] else ""
        return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # of an earlier version, or being written
        return "an unknown process"


def _open(folder: Path, kind: int, output: Path, progress: Callable[[], str]) -> IO[str]:
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            what = f"The output cannot be written: {error.strerror}"
            remedy = "Remove the file that prevents creating a folder here"
            raise DataError(what, remedy=remedy, location=output) from error
        with suppress(FileNotFoundError):  # a run that has just ended removed the folder
            stream = (folder / LOCK_NAME).open("a+")  # over NFS, a shared lock needs read access
            if _lock(stream, kind) and os.fstat(stream.fileno()).st_nlink:  # else that run removed the lock file
                return stream
            stream.close()
        if time.monotonic() > deadline_s:
            raise _busy(folder, output, progress)
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


def _busy(folder: Path, output: Path, progress: Callable[[], str]) -> DataError:
    facts = ", ".join(filter(None, (lock_holder(folder), progress())))
    return DataError(
        f"Another run is writing to this folder{': ' * bool(facts)}{facts}",
        remedy="Wait for it to end, stop it, or name another folder",
        location=output,
        transient=True,
    )
