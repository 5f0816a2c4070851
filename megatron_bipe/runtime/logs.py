"""Log format: UTC time and rank first, so that lines of several ranks and files can be merged."""

import logging
import time


class _RankFormatter(logging.Formatter):
    """Formatter for `2026-11-28 16:40:07Z rank 0 message`, with the level before the message from WARNING on."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"%(asctime)sZ rank {rank} %(level)s%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        record.level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        return super().format(record)


def log_to_stderr(rank: int) -> None:
    """Send this process's log to stderr: INFO on rank 0, WARNING on the others."""
    handler = logging.StreamHandler()
    handler.setFormatter(_RankFormatter(rank))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler])
