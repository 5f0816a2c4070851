"""What ranks log, for tests that run inside them."""

import logging


class RecordedLog(logging.Handler):
    """Records the messages of `megatron_bipe`, from INFO on or from another level."""

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.lines: list[str] = []
        logger = logging.getLogger("megatron_bipe")
        logger.addHandler(self)
        logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
