"""Exit codes of commands whose pipes break."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PROGRAM = """
import os, sys
from tools._cli import command

@command
def main(argv):
    if argv:
        raise BrokenPipeError("a worker's pipe")
    for number in range(100_000):
        print(number)

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("stdout", ["file", "pipe"])
def test_command_whose_worker_breaks_a_pipe_fails(stdout, tmp_path):
    with (tmp_path / "out").open("w") as file:
        target = {"file": file, "pipe": subprocess.PIPE}[stdout]
        command = [sys.executable, "-c", PROGRAM, "break"]
        done = subprocess.run(command, cwd=ROOT, stdout=target, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and "a worker's pipe" in done.stderr


def test_command_whose_reader_has_seen_enough_is_done():
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_command_whose_output_file_is_on_a_full_disk_has_one_error():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("DataError: ") and done.stderr.count("\n") == 1, done.stderr
