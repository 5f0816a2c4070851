"""How a rank leaves that cannot go on: codes and words, in a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.parallel.watchdog import Watchdog

ROOT = Path(__file__).parents[3]
PROGRAM = """
import threading
from megatron_bipe.errors import DataError
from megatron_bipe.parallel.failure import run_rank

def main(error, mesh):
    threading.Thread(target=threading.Event().wait).start()  # as a collective's: Python's own end would wait for it
    print("before", end="")
    if error:
        raise error

run_rank(main, {error})
{after}
"""


def leave(error, output=subprocess.PIPE, **env):
    program = textwrap.dedent(PROGRAM.format(error=error, after="import os; os._exit(7)"))
    command, full = [sys.executable, "-c", program], {"PATH": "/usr/bin:/bin"} | env
    return subprocess.run(
        command, cwd=ROOT, env=full, stdout=output, stderr=output, text=True, timeout=120, check=False
    )


def test_run_rank_that_fails_leaves_with_code_1_and_names_itself():
    done = leave("ValueError('broken')")
    assert done.returncode == 1 and done.stdout == "before"
    assert "rank 0 of 1 on " in done.stderr and "ValueError: broken" in done.stderr and ", in main" in done.stderr


def test_run_rank_that_fails_leaves_though_its_launcher_took_the_pipe_of_its_output_along():
    reader, writer = os.pipe()
    os.close(reader)
    assert leave("ValueError('broken')", writer).returncode == 1


def test_run_rank_with_a_user_error_leaves_with_code_2_and_one_message():
    done = leave("DataError('no data', remedy='Make some', location='there')")
    assert done.returncode == 2
    assert done.stderr.strip().startswith("DataError: no data. Make some.  [there]")
    assert "Traceback" not in done.stderr


def test_run_rank_of_half_a_launch_leaves_with_code_2():
    done = leave("None", RANK="1")
    assert done.returncode == 2 and "ConfigError: " in done.stderr and "RANK=1" in done.stderr


def test_run_rank_that_succeeds_returns():
    assert leave("None").returncode == 7


def test_watchdog_hands_on_every_micro_batch(monkeypatch):
    mesh = Mesh(0, 0, 1, 1, "cpu")
    watchdog = Watchdog(mesh, 5, lambda timeout_s: pytest.fail("not entered"))
    assert list(watchdog.over("step 1", iter("abc"))) == ["a", "b", "c"]
