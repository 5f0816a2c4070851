"""Log lines of a rank."""

import logging
import re
import time

import pytest

from megatron_bipe.runtime.exit_handling import log_to_stderr
from tests.helpers.tools import own_logging

START = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\dZ rank {rank} "


@pytest.mark.parametrize(
    ("rank", "messages"), [(0, ["an info of 3", "WARNING: a warning"]), (2, ["WARNING: a warning"])]
)
def test_every_line_begins_with_utc_time_and_rank(rank, messages, capsys):
    with own_logging():
        log_to_stderr(rank)
        logging.getLogger("x").info("an info of %d", 3)
        logging.getLogger("x").warning("a warning")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert re.fullmatch(START.format(rank=rank) + re.escape(message), line)


def test_time_is_utc_whatever_the_zone(monkeypatch):
    record = logging.makeLogRecord({"msg": "now", "created": 0.0, "levelno": logging.INFO})
    with own_logging(), monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        assert time.localtime(0).tm_hour == 9
        log_to_stderr(0)
        line = logging.getLogger().handlers[0].format(record)
    time.tzset()
    assert line.startswith("1970-01-01 00:00:00Z rank 0 ")
