"""Lines of a rank's log."""

import os
import re
import subprocess
import sys

import pytest

CODE = """
import logging
from megatron_bipe.runtime.logs import log_to_stderr
log_to_stderr({rank})
logging.getLogger("x").info("an info of %d", 3)
logging.getLogger("x").warning("a warning")
"""
START = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\dZ rank {rank} "


@pytest.mark.parametrize(
    ("rank", "messages"), [(0, ["an info of 3", "WARNING: a warning"]), (2, ["WARNING: a warning"])]
)
def test_every_line_begins_with_utc_time_and_rank(rank, messages):
    done = subprocess.run([sys.executable, "-c", CODE.format(rank=rank)], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert re.fullmatch(START.format(rank=rank) + re.escape(message), line)


def test_time_is_utc_whatever_the_zone():
    code = (
        "import logging\n"
        "from megatron_bipe.runtime.logs import log_to_stderr\n"
        "log_to_stderr(0)\n"
        "record = logging.makeLogRecord({'msg': 'now', 'created': 0.0, 'levelno': 20})\n"
        "print(logging.getLogger().handlers[0].format(record))\n"
    )
    environment = os.environ | {"TZ": "Asia/Tokyo"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("1970-01-01 00:00:00Z rank 0 ")
