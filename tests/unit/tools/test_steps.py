"""Commands run in turn and concurrently: none runs twice, output is kept, and a failure is one error."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_bipe.errors import BipeError
from tests.helpers.errors import raises
from tests.helpers.tools import script


@pytest.fixture(scope="module")
def steps():
    with script("_steps") as module:
        yield module


@pytest.fixture
def python(steps, tmp_path):
    """Makes a step that makes its result, by default named like it, and then runs the code."""

    def make(title, code, name="", result=None):
        made, program = tmp_path / (result or title), tmp_path / f"{title}.py"
        program.write_text(f"open({str(made)!r}, 'w')\n{code}")
        return steps.Step(title, [sys.executable, str(program)], made, name)

    return make


def test_fill_repeats_what_is_for_each(steps):
    patterns = [
        steps.Pattern("One", "echo {out} {n}", "one"),
        steps.Pattern("Do {each}", "echo {each}", "{each}/done"),
        steps.Pattern("Also {each}", "A=1 echo {each}", "{each}/also", together=True),
    ]
    filled = steps.fill(patterns, Path("some where"), {"n": 3}, ["a", "b"])
    assert filled == [
        [steps.Step("One", ["echo", "some where", "3"], Path("some where/one"))],
        [steps.Step("Do a", ["echo", "a"], Path("some where/a/done"), "a")],
        [steps.Step("Do b", ["echo", "b"], Path("some where/b/done"), "b")],
        [
            steps.Step("Also a", ["A=1", "echo", "a"], Path("some where/a/also"), "a"),
            steps.Step("Also b", ["A=1", "echo", "b"], Path("some where/b/also"), "b"),
        ],
    ]


def test_run_steps_stops_at_the_first_that_fails_and_keeps_the_times_of_those_before(steps, python, tmp_path):
    planned = [[python("a", "import time; time.sleep(0.5)")], [python("b", "1/0")]]
    planned.append([python("c", "")])
    with raises(BipeError, "exit code 1", tmp_path / "b", location="b.log"):
        steps.run_steps(planned, tmp_path)
    assert (tmp_path / "a").exists() and not (tmp_path / "c").exists()
    before = steps.read_times(tmp_path)
    assert set(before) == {"a"} and before["a"] >= 0.5
    planned[1] = [python("b2", "")]
    steps.run_steps(planned, tmp_path)
    times = json.loads((tmp_path / steps.TIMES_FILE).read_text())
    assert set(times["steps_s"]) == {"a", "b2", "c"} and times["steps_s"]["a"] == before["a"]
    assert times["total_s"] == pytest.approx(sum(times["steps_s"].values()), abs=0.2)


def test_run_stage_runs_all_at_once_and_names_each_line(steps, python, tmp_path, capsys):
    wait = """
import os, pathlib, time
there = pathlib.Path({folder!r})
(there / {name!r}).touch()
while not ((there / "one").exists() and (there / "two").exists()):
    time.sleep(0.01)
print("line of", {name!r}, os.environ["WHO"])
"""
    stage = []
    for name in ("one", "two"):
        step = python(f"Do {name}", wait.format(folder=str(tmp_path), name=name), name)
        stage.append(step._replace(command=[f"WHO={name} itself", *step.command]))
    steps.run_steps([stage], tmp_path)
    shown = capsys.readouterr().out
    assert "    one: line of one one itself\n" in shown and "    two: line of two two itself\n" in shown
    times = json.loads((tmp_path / steps.TIMES_FILE).read_text())
    assert times["total_s"] == max(times["steps_s"].values())
    assert "line of two" not in (tmp_path / "logs" / "Do_one.log").read_text()
    steps.run_steps([stage], tmp_path)
    assert capsys.readouterr().out.count("done before") == 2
    assert json.loads((tmp_path / steps.TIMES_FILE).read_text()) == times


def _is_running(pid_file):
    return Path(f"/proc/{pid_file.read_text()}/exe").exists()


PID = "import os, pathlib, time; pathlib.Path({!r}).write_text(str(os.getpid()))"
SLEEP = f"{PID}; time.sleep(300)"
# A process is a zombie, and in /proc, until who started it has seen its end.
FAIL = """
import os, pathlib, time
long, done = map(pathlib.Path, ({!r}, {!r}))
while not (long.exists() and done.exists() and done.read_text()) or os.path.exists(f"/proc/{{done.read_text()}}"):
    time.sleep(0.01)
1 / 0
"""


def test_run_stage_one_that_fails_ends_the_others(steps, python, tmp_path):
    pid, pid_of_done = tmp_path / "pid", tmp_path / "pid of done"
    stage = [python("long", SLEEP.format(str(pid))), python("short", FAIL.format(str(pid), str(pid_of_done)))]
    stage.append(python("done", PID.format(str(pid_of_done))))
    begin_s = time.monotonic()
    with raises(BipeError, "exit code 1", location="short.log"):
        steps.run_stage(stage, tmp_path, times := {})
    assert set(times) == {"done"}
    assert not _is_running(pid) and time.monotonic() - begin_s < 60


SIGNALS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]


@pytest.mark.parametrize(("number", "kind"), SIGNALS)
def test_run_steps_signal_ends_all(steps, python, tmp_path, number, kind):
    pids = [tmp_path / "pid-1", tmp_path / "pid-2"]
    stage = [python(pid.name, SLEEP.format(str(pid)), result=f"made-{pid.name}") for pid in pids]

    def send():
        while not all(pid.exists() and pid.read_text() for pid in pids):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(kind):
        steps.run_steps([stage], tmp_path)
    assert not any(map(_is_running, pids))


@pytest.mark.parametrize(("number", "kind"), SIGNALS)
def test_run_steps_signal_while_a_command_is_being_started_is_not_lost(steps, python, tmp_path, number, kind):
    to_send = [number]
    os.register_at_fork(after_in_parent=lambda: to_send and os.kill(os.getpid(), to_send.pop()))
    with pytest.raises(kind):
        steps.run_steps([[python("long", "import time; time.sleep(20)")]], tmp_path)
    assert not to_send


def test_run_stage_finished_before_is_not_run_again(steps, tmp_path, capsys):
    (tmp_path / "result").touch()
    steps.run_stage([steps.Step("Fail", ["false"], tmp_path / "result")], tmp_path, times := {})
    assert "done before" in capsys.readouterr().out and not times


def test_run_stage_result_of_another_command_is_refused(steps, tmp_path, monkeypatch):
    def run(*options, folder=tmp_path, assigned=()):
        command = [*assigned, "touch", f"{folder}/result", *options]
        steps.run_stage([steps.Step("Do it", command, folder / "result")], folder, {})

    run()
    run()
    with raises(BipeError, tmp_path / "result", "'$ touch OUTPUT/result'", "--no-create"):
        run("--no-create")
    with raises(BipeError, "'$ touch OUTPUT/result'", "'$ A=1 touch"):
        run(assigned=["A=1"])
    monkeypatch.chdir(tmp_path.parent)
    run(folder=Path(tmp_path.name))  # the same, from elsewhere


OUTPUT = """
[2026-01-01 10:00:00,123] [INFO] [launch.py:1:main] noise
[2026-01-01 10:00:00,123] [ERROR] [launch.py:1:main] exits with return code = 1
[2026-01-01T10:00:00Z rank 0] step 1
/x/lib/python3.11/site-packages/torch/cuda/x.py:1: UserWarning: a noise of torch
  noise()
  step 2
/x/megatron_bipe/model.py:1: UserWarning: step 3
"""


def test_run_stage_keeps_all_output_and_shows_what_matters(steps, python, tmp_path, capsys):
    steps.run_stage([python("Do it", f"print({OUTPUT!r})")], tmp_path, {})
    shown = capsys.readouterr().out
    assert all(f"step {number}" in shown for number in (1, 2, 3)) and "exits with return code" in shown
    assert "noise" not in shown
    assert OUTPUT in (tmp_path / "logs" / "Do_it.log").read_text()


@pytest.mark.parametrize("code", [3, 0])
def test_run_stage_failing_or_without_result_names_its_log_and_shows_its_end_unfiltered(steps, tmp_path, capsys, code):
    lines = "\n".join(f"{number} lines" for number in range(1000, 1030)) + "\n" + OUTPUT.strip()
    step = steps.Step(
        "Do it", [sys.executable, "-c", f"print({lines!r}, flush=True)\nraise SystemExit({code})"], tmp_path / "result"
    )
    with raises(BipeError, f"exit code {code}", tmp_path / "result", location=tmp_path / "logs" / "Do_it.log"):
        steps.run_stage([step], tmp_path, {})
    shown = capsys.readouterr().out
    assert "    | [2026-01-01 10:00:00,123] [INFO] [launch.py:1:main] noise\n" in shown
    assert "| 1029 lines" in shown and "| 1000 lines" not in shown


COUNT = """
import os, pathlib, time
here = pathlib.Path({here!r})
number = len(list(here.glob("running-*")))
(here / {name!r}).touch()
with (here / "numbers").open("a") as file:
    file.write(f"{{number}} ")
time.sleep(0.5)
(here / {name!r}).unlink()
"""


def test_run_steps_starts_no_more_at_once_than_asked(steps, python, tmp_path):
    stage = [python(f"s{n}", COUNT.format(here=str(tmp_path), name=f"running-{n}")) for n in range(5)]
    steps.run_steps([stage], tmp_path, steps.Pace(at_once=2))
    numbers = list(map(int, (tmp_path / "numbers").read_text().split()))
    assert len(numbers) == 5 and max(numbers) == 1


def test_run_steps_that_keep_going_raise_the_first_failure_after_all_others(steps, python, tmp_path, capsys):
    first = [python("a", "1/0", result="a made"), python("b", ""), python("c", "")]
    (tmp_path / "a.py").write_text("1/0")
    second = [python("needs a", "")._replace(needs=tmp_path / "a made"), python("needs b", "")]
    second[1] = second[1]._replace(needs=tmp_path / "b")
    with raises(BipeError, "exit code 1", location="a.log"):
        steps.run_steps([first, second], tmp_path, steps.Pace(at_once=1, keep_going=True))
    assert all((tmp_path / name).exists() for name in ("b", "c", "needs b"))
    assert not (tmp_path / "needs a").exists()
    assert f"skipped: {tmp_path / 'a made'} is missing" in capsys.readouterr().out
    assert set(steps.read_times(tmp_path)) == {"b", "c", "needs b"}


def test_result_that_is_compared_elsewhere_may_be_of_another_command(steps, python, tmp_path):
    steps.run_steps([[python("a", "")]], tmp_path)
    other = steps.Step("a", ["false"], tmp_path / "a")
    with raises(BipeError, "false"):
        steps.run_steps([[other]], tmp_path)
    steps.run_steps([[other._replace(compares_command=False)]], tmp_path)
