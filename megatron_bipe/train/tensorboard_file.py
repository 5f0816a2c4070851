"""The file of scalars that TensorBoard shows; it waits for the disk like the other logs of a run."""

import io
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_bipe.train.log_file import LogFile
from megatron_bipe.train.metrics_file import Line
from megatron_bipe.train.trackers import History, Sink, scalars


class Board(Sink):
    """Files of scalars for TensorBoard, one for each start and rollback.

    torch's `SummaryWriter` is not used: once a write has failed, it fails until the end, and what it held is lost.

    Args:
        folder: folder of the run's TensorBoard files; created.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file: LogFile | None = None

    def begin(self, history: History) -> None:
        """Begin a file; TensorBoard drops points of earlier files from the last step on, which is added again."""
        self.close()
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = LogFile(self._folder / name)
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=history.step, session_log=SessionLog(status=SessionLog.START)))
        self.write(history.last_lines)

    def write(self, lines: Sequence[Line]) -> None:
        for line in lines:
            points = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(line).items()]
            self._add(Event(step=line["step"], summary=Summary(value=points)))

    def sync(self) -> None:
        """Write what waits for the disk."""
        if self._file is not None:
            self._file.write()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        assert self._file is not None
        self._file.add(record.getvalue())
