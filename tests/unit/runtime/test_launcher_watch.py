"""Ranks whose launchers end; scripts with a launcher's name replace it."""

import os
import signal
import subprocess
import sys
import time
import uuid

import pytest

from megatron_bipe.runtime.child_processes import LOOK_S
from tests.helpers.commands import LEAVE_LIMIT_S, MARK, marked
from tests.helpers.paths import ROOT

# Starts its command and waits for it; with "after-parent" only after its own parent has ended.
LAUNCHER = """
import os, subprocess, sys, time

parent, command = os.getppid(), sys.argv[1:]
if command[0] == "after-parent":
    command = command[1:]
    print("up", flush=True)
    while os.getppid() == parent:
        time.sleep(0.05)
if "prterun" not in sys.argv[0]:
    subprocess.Popen([sys.executable, *command]).wait()
else:  # all output goes through its hands
    for line in subprocess.Popen([sys.executable, *command], stdout=-1, stderr=subprocess.STDOUT, text=True).stdout:
        print(line, end="", flush=True)
"""
RANK = """
import ctypes, pathlib, signal, sys, time
from megatron_bipe.runtime.child_processes import watch_launcher

how, file = sys.argv[1], pathlib.Path(sys.argv[2])
watch_launcher(is_importing=how != "is killed, too")
if how != "while it loads a library":
    watch_launcher()
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print("up", flush=True)
if how == "while it loads a library":
    ctypes.PyDLL(None).sleep(300)  # no other thread can run
if how == "when it is asked to stop":  # Python cannot handle the signal as long as this takes
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # in this thread: the call is not interrupted
    ctypes.CDLL(None).sleep(5)
while not asked:
    time.sleep(0.1)
time.sleep(1)
file.write_text("saved")
"""
HOST = "deepspeed.launcher.launch"
CASES = {  # launchers before the rank, and the signal for the first of them
    "ends": (["torchrun"], signal.SIGKILL),
    "of its deepspeed": (["deepspeed", HOST], signal.SIGKILL),
    "of a pipe": (["prterun"], signal.SIGKILL),
    "while it loads a library": (["torchrun"], signal.SIGKILL),
    "when it is asked to stop": (["torchrun"], signal.SIGTERM),
    "is a script": (["train.py"], signal.SIGKILL),
    "before it starts": (["deepspeed", HOST], signal.SIGKILL),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Run all cases concurrently: case -> (seconds until all processes ended or None, output, saved)."""
    folder = tmp_path_factory.mktemp("launchers")
    for name in ("torchrun", "prterun", "deepspeed", HOST, "train.py"):
        (folder / name).write_text(LAUNCHER)
    (folder / "rank.py").write_text(RANK)
    started = {}
    for number, (case, (launchers, _)) in enumerate(CASES.items()):
        command = [
            *(str(folder / name) for name in launchers),
            str(folder / "rank.py"),
            case,
            str(folder / f"{number}"),
        ]
        if case == "before it starts":
            command.insert(2, "after-parent")
        mark = uuid.uuid4().hex
        env = os.environ | {MARK: mark, "RANK": "5"} | ({"CROSS_RANK": "0"} if HOST in launchers else {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen([sys.executable, *command], env=env, cwd=ROOT, start_new_session=True, **pipes)
        started[case] = (mark, process, folder / f"{number}")
    for _, process, _ in started.values():
        assert process.stdout.readline() == "up\n"
    begin_s, took_s = time.monotonic(), dict.fromkeys(CASES)
    for case, (_, process, _) in started.items():
        number = CASES[case][1]
        os.killpg(process.pid, number) if case == "when it is asked to stop" else process.send_signal(number)
        process.wait()
    while sum(seconds is None for seconds in took_s.values()) > 1 and time.monotonic() < begin_s + LEAVE_LIMIT_S:
        for case, (mark, _, _) in started.items():
            if took_s[case] is None and not marked(mark):
                took_s[case] = time.monotonic() - begin_s
        time.sleep(0.1)
    time.sleep(3 * LOOK_S)  # also for the rank that continues
    for mark, _, _ in started.values():
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
    return {case: (took_s[case], process.stdout.read(), file.exists()) for case, (_, process, file) in started.items()}


@pytest.mark.parametrize("case", ["ends", "of its deepspeed"])
def test_watch_launcher_that_is_killed_ends_the_rank_with_a_message(ranks, case):
    seconds, output, saved = ranks[case]
    assert seconds is not None and not saved
    assert "rank 5" in output and f"{CASES[case][0][0]} (process" in output, output


def test_watch_launcher_that_relayed_the_output_ends_the_rank(ranks):
    assert ranks["of a pipe"][0] is not None


def test_watch_launcher_that_is_killed_while_a_library_is_loaded_ends_the_rank(ranks):
    assert ranks["while it loads a library"][0] is not None


def test_watch_launcher_that_ended_before_the_rank_began_ends_it(ranks):
    seconds, output, _ = ranks["before it starts"]
    assert seconds is not None and "rank 5" in output, output


def test_watch_launcher_leaves_a_rank_that_was_asked_to_stop_the_time_to_save(ranks):
    _, output, saved = ranks["when it is asked to stop"]
    assert saved, output


def test_watch_launcher_of_a_rank_that_a_script_started_lets_it_continue(ranks):
    seconds, output, _ = ranks["is a script"]
    assert seconds is None and not output, output
