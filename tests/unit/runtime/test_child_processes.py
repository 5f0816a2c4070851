"""Child processes end with their parents, however these end."""

import os
import signal
import subprocess
import sys
import uuid

import pytest

from megatron_bipe.runtime.child_processes import ChildProcess, run_command
from tests.helpers.commands import MARK, left_after, marked
from tests.helpers.paths import ROOT

LIMIT_S = 10
PARENT = """
import sys
from megatron_bipe.runtime.child_processes import ChildProcess, end_all, raising_on_signals

stubborn = "trap '' TERM INT; sleep 300 & bash -c 'sleep 300; true' & echo up; wait; wait"
polite = "trap 'sleep 1; echo saved >> $FILE; exit' TERM; sleep 300 & echo up; wait"
children = [ChildProcess(["bash", "-c", script]) for script in (stubborn, polite)]
try:
    with raising_on_signals():
        children[0].process.wait(1 if "fail" in sys.argv else None)
finally:
    end_all(children)
"""


def test_child_process_ends_with_its_parent_however_that_ends(tmp_path):
    ends = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL, "fail": None}
    marks = {name: uuid.uuid4().hex for name in ends}
    parents = {
        name: subprocess.Popen(
            ["bash", "-c", "trap '' INT; exec \"$@\"", "bash", sys.executable, "-c", PARENT, name],
            env=os.environ | {MARK: marks[name], "FILE": str(tmp_path / name)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for name in ends
    }
    for name, parent in parents.items():
        assert [parent.stdout.readline() for _ in range(2)] == [b"up\n"] * 2
        assert len(marked(marks[name])) >= 8  # parent, two guards, two shells and what they started
    for name, parent in parents.items():
        if ends[name] is not None:
            parent.send_signal(ends[name])
    assert not left_after(marks.values(), LIMIT_S)
    assert all((tmp_path / name).read_text() == "saved\n" for name in ends)  # SIGTERM came first
    codes = {name: parent.wait() for name, parent in parents.items()}
    assert codes == {"SIGINT": -signal.SIGINT, "SIGTERM": 143, "SIGKILL": -signal.SIGKILL, "fail": 1}


AT_ONCE = """
import os, signal, subprocess
from megatron_bipe.runtime.child_processes import ChildProcess

start = subprocess.Popen

def die_after(command, **options):
    process = start(command, **options)
    if command[0] == "sleep":
        os.kill(os.getpid(), signal.SIGKILL)
    return process

subprocess.Popen = die_after
ChildProcess(["sleep", "300"])
"""


def test_child_process_ends_with_a_parent_that_dies_as_soon_as_it_has_started_it():
    mark = uuid.uuid4().hex
    parent = subprocess.run([sys.executable, "-c", AT_ONCE], env=os.environ | {MARK: mark}, cwd=ROOT, check=False)
    assert parent.returncode == -signal.SIGKILL
    assert not left_after([mark], LIMIT_S)


def test_run_command_ends_what_the_command_leaves():
    mark = uuid.uuid4().hex
    done = run_command(["bash", "-c", "sleep 300 & exit 3"], env={MARK: mark})
    assert done.returncode == 3
    assert not marked(mark)


def test_run_command_gives_input_and_output_and_checks_the_exit_code():
    done = run_command(["cat"], stdin_text="text", stdout=subprocess.PIPE, check=True)
    assert done.stdout == "text"
    with pytest.raises(subprocess.CalledProcessError):
        run_command(["false"], check=True)


def test_child_process_that_cannot_be_started_leaves_no_guard(monkeypatch):
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    with pytest.raises(FileNotFoundError):
        ChildProcess(["/no/such"])
    assert not marked(mark)
