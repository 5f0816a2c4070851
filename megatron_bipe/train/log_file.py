"""The files to which a run appends its logs, and TensorBoard's among them.

A disk that is full, read-only or unreachable does not end training, as it does not where a checkpoint is written. What
could not be written waits in memory and follows as soon as the disk accepts it, in order.
"""

import io
import logging
import math
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

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


class Board:
    """A file of scalars for TensorBoard.

    torch's `SummaryWriter` is not used: once a write has failed, it fails until the end, and what it held is lost.

    Args:
        folder: folder of the run's TensorBoard files; created.
        purge_step: TensorBoard drops points of earlier files from this step on.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names.
        self._file = LogFile(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}")
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, scalars: Mapping[str, float | None]) -> None:
        """Add the values of a step by name; None is shown as not a number."""
        points = [
            Summary.Value(tag=name, simple_value=math.nan if value is None else value)
            for name, value in scalars.items()
        ]
        self._add(Event(step=step, summary=Summary(value=points)))

    def write(self) -> None:
        self._file.write()

    def close(self) -> None:
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.add(record.getvalue())
