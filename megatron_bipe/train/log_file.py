"""The files to which a run appends its logs.

A disk that is full, read-only or unreachable does not end training, as it does not where a checkpoint is written. What
could not be written waits in memory and follows as soon as the disk accepts it, in order.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_log = logging.getLogger(__name__)


class LogFile:
    """A file to which data is appended; a failure to write is a warning.

    Args:
        path: path of the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._waiting = bytearray()
        self._has_failed = False

    def add(self, data: bytes) -> None:
        """Append data, or keep it until the disk accepts it."""
        self._waiting += data
        self.write()

    def write(self, *, sync: bool = False) -> None:
        """Write what waits, and with `sync` wait until the disk has it."""
        try:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
            while self._waiting:  # a nearly full disk accepts only a part
                del self._waiting[: self._file.write(self._waiting)]
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._release()  # a file server may have replaced the file; it is opened again the next time
            if not self._has_failed:
                text = "%s cannot be written: %s. Training continues; the lines follow once this is fixed"
                _log.warning(text, self.path, error.strerror or error)
            self._has_failed = True
        else:
            if self._has_failed:
                _log.warning("%s is written again, and complete", self.path)
            self._has_failed = False

    def close(self) -> None:
        """Write what waits, or warn that it is lost."""
        self.write()
        if self._waiting:
            _log.warning("%s lacks its last %d bytes", self.path, len(self._waiting))
        self._release()

    def _release(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
