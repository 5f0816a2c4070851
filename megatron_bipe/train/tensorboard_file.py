"""The file of scalars that TensorBoard shows; it waits for the disk like the other logs of a run."""

import io
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_bipe.train.log_file import LogFile


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
