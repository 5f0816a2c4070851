"""User-facing errors: each message states what was seen, the rule, the remedy and the location.

Command-line tools exit with code 2 on a `BipeError` (the user can fix it), or with code 1 if the error is transient:
the same command may succeed later without a change. Any other exception is a defect; they then exit with code 1 and a
traceback.
"""

import errno
from pathlib import Path
from typing import Any

FAILED, USER_ERROR = 1, 2  # exit codes

# Errors of a disk or a file server that may be over when the same file is read again.
_TRANSIENT_ERRNOS = {
    *(errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOLCK),
    *(errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
}


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
