"""User-facing errors: each message states what was seen, the rule, the remedy and the location.

Command-line tools exit with code 2 on a `BipeError` (the user can fix it), or with code 1 if the error is transient:
the same command may succeed later without a change. Failures of a disk or file system become such errors in one place,
`as_user_error`. Any other exception is a defect; they then exit with code 1 and a traceback.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FAILED, USER_ERROR = 1, 2  # exit codes


class BipeError(Exception):
    """Base of all errors that the user can fix.

    Args:
        message: what was seen, and the rule that it breaks.
        remedy: how to fix it, as an imperative sentence.
        location: file, field or command that the message is about.
        transient: True if the same command may succeed later without a change, such as after a lock is released.
    """

    def __init__(self, message: str, *, remedy: str = "", location: str | Path = "", transient: bool = False) -> None:
        self.transient = transient
        self.message = message
        self.remedy = remedy
        self.location = str(location)
        text = " ".join(_sentence(part) for part in (message, remedy) if part)
        super().__init__(f"{text}  [{self.location}]" if self.location else text)

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling, which does not restore keyword arguments by default."""
        return _rebuild, (type(self), self.message, self.remedy, self.location, is_transient(self))


def _rebuild(kind: type[BipeError], message: str, remedy: str, location: str, transient: bool) -> BipeError:
    return kind(message, remedy=remedy, location=location, transient=transient)


def exit_code(error: BaseException) -> int:
    """Return 2 if the user can fix the error, else 1."""
    error = as_user_error(error)
    return USER_ERROR if isinstance(error, BipeError) and not is_transient(error) else FAILED


def is_transient(error: BaseException | None) -> bool:
    """Return True if the same command may succeed later: the error says so, or it was caused by a file server."""
    while error is not None:
        if isinstance(error, BipeError) and error.transient:
            return True
        if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
            return True
        error = error.__cause__ or error.__context__
    return False


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


class ConfigError(BipeError):
    """An impossible run configuration, DeepSpeed configuration, or combination of both."""


class DataError(BipeError):
    """Raw text, a tokenizer or a dataset that is missing, damaged or not the expected one."""


class CheckpointError(BipeError):
    """A checkpoint or an exported model that is missing, damaged or belongs to something else."""


class HealthError(BipeError):
    """A training failure that persists after all automatic recovery."""


class DivergenceError(BipeError):
    """A difference between ranks that must hold identical values."""


_FREE_SPACE = "Free space there, or use another disk"
_CHECK_PERMISSIONS = "Check the permissions, or use another path"
_REMOVE = "Remove what is in the way, or use another path"
_WRITING = {  # by errno: the problem and its remedy
    errno.ENOSPC: ("the disk is full", _FREE_SPACE),
    errno.EDQUOT: ("the disk quota is used up", _FREE_SPACE),
    errno.EFBIG: ("the file would exceed the limit on file sizes", "Raise the limit (ulimit -f), or use another disk"),
    errno.EROFS: ("the file system is read-only", "Make it writable, or use another disk"),
}
_PATHS = {
    errno.EACCES: ("permission denied", _CHECK_PERMISSIONS),
    errno.EPERM: ("the operation is not permitted", _CHECK_PERMISSIONS),
    errno.ENOTDIR: ("a part of the path is not a folder", _REMOVE),
    errno.EISDIR: ("a folder has this name", _REMOVE),
    errno.EEXIST: ("a file has this name", _REMOVE),
    errno.ENAMETOOLONG: ("the name is too long", "Use a shorter path"),
    errno.EMFILE: ("too many files are open", "Raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open", "Close other programs"),
}
_CHECK_DISK = "Check the disk or the file server, then run the same command again"
_TRANSIENT = {
    errno.EIO: ("the disk reports an input/output error", _CHECK_DISK),
    errno.ESTALE: ("the file server has replaced this file", _CHECK_DISK),
    errno.ETIMEDOUT: ("the file server does not answer", _CHECK_DISK),
}
# These may be over when the same file is read again.
_TRANSIENT_ERRNOS = {
    *(*_TRANSIENT, errno.EREMOTEIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOLCK),
    *(errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
}
_IN_TEXT = re.compile(r"\((?:os error|errno) (\d+)\)", re.IGNORECASE)  # libraries in Rust raise no OSError


def as_user_error(error: BaseException) -> BaseException:
    """Return the `DataError` for a failure of a disk or file system; any other exception is returned as it is."""
    found = _IN_TEXT.search(str(error))
    code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    path = failed_path(error) if isinstance(error, OSError) else ""
    known = _WRITING | _TRANSIENT | (_PATHS if path else {})
    if isinstance(error, BipeError) or code not in known:
        return error
    problem, remedy = known[code]
    return DataError(problem, remedy=remedy, location=path, transient=code in _TRANSIENT)


def failed_path(error: OSError) -> str:
    """Return the path that an operation failed for, the target of a copy; empty if the error names none."""
    path = error.filename2 or error.filename or ""
    return path.decode(errors="replace") if isinstance(path, bytes) else str(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the path in errors of writes in the block; the system names it only if a file cannot be opened."""
    try:
        yield
    except OSError as error:
        if error.errno in _WRITING and error.filename is None:
            error.filename = str(path)
        raise
