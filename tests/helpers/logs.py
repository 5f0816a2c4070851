"""Recorder of log messages, for tests that run inside ranks."""

import logging


class RecordedLog(logging.Handler):
    """Handler that records the messages of `megatron_bipe` from a level on, by default INFO."""

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.lines: list[str] = []
        logger = logging.getLogger("megatron_bipe")
        logger.addHandler(self)
        logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
