"""Child processes end with their parents, however these end."""

import os
import signal
import subprocess
import sys
import uuid

import pytest

from megatron_bipe.runtime.child_processes import ChildProcess, run_command
from tests.helpers.commands import LEAVE_LIMIT_S, MARK, left_after, marked
from tests.helpers.paths import ROOT

PARENT = """
import sys, time
from megatron_bipe.runtime.child_processes import ChildProcess, end_all, signals_noted

stubborn = "trap '' TERM INT; sleep 300 & bash -c 'sleep 300; true' & echo up; wait; wait"
polite = "trap 'sleep 1; echo saved >> $FILE; exit' TERM; sleep 300 & echo up; wait"
children = [ChildProcess(["bash", "-c", script]) for script in (stubborn, polite)]
try:
    with signals_noted() as check:
        for _ in range(20 if "fail" in sys.argv else 10**6):
            check()
            time.sleep(0.05)
        raise ValueError
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
    assert not left_after(marks.values(), LEAVE_LIMIT_S)
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
    assert not left_after([mark], LEAVE_LIMIT_S)


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


LAUNCHER = """
import signal, subprocess, sys
rank = "trap 'echo asked; exit 75' TERM; echo up; while :; do sleep 0.1; done"
sys.exit(subprocess.Popen(["bash", "-c", rank]).wait() if "deepspeed.launcher.launch" in sys.argv[0] else
         subprocess.Popen([sys.executable, sys.argv[1]]).wait())
"""


def test_child_process_asked_to_stop_spares_the_launchers_of_deepspeed_which_would_kill_ranks(tmp_path):
    for name in ("deepspeed", "deepspeed.launcher.launch"):
        (tmp_path / name).write_text(LAUNCHER)
    command = [sys.executable, str(tmp_path / "deepspeed"), str(tmp_path / "deepspeed.launcher.launch")]
    with ChildProcess(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.process.stdout.readline() == "up\n"
        child.ask_to_stop(signal.SIGTERM)
        assert child.process.wait(LEAVE_LIMIT_S) == 75 and child.process.stdout.read() == "asked\n"


def test_child_process_asked_to_stop_signals_deepspeed_that_has_no_ranks_here(tmp_path):
    (tmp_path / "deepspeed").write_text(LAUNCHER)
    (tmp_path / "pdsh").write_text("import time; print('up', flush=True); time.sleep(300)")
    with ChildProcess([sys.executable, tmp_path / "deepspeed", tmp_path / "pdsh"], stdout=subprocess.PIPE) as child:
        assert child.process.stdout.readline() == b"up\n"
        child.ask_to_stop(signal.SIGTERM)
        assert child.process.wait(LEAVE_LIMIT_S) == -signal.SIGTERM


# The leader ends after its child, whose parent, in another group, does not reap it.
ZOMBIE = """
import os, time
group = os.getpgid(0)
parent = os.fork()
if parent == 0:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.setpgid(0, 0)
    print("up", flush=True)
    time.sleep(300)
time.sleep(0.2)
"""


def test_child_process_is_over_although_nobody_reaps_a_zombie_of_its_group(tmp_path):
    mark = uuid.uuid4().hex
    child = ChildProcess([sys.executable, "-c", ZOMBIE], env={MARK: mark}, stdout=subprocess.PIPE)
    try:
        child.process.wait(LEAVE_LIMIT_S)
        assert child.send(0), "the zombie is expected to be in the group"
        assert child.is_over()
    finally:
        child.kill()
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
