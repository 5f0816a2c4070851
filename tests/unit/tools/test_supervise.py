"""tools/supervise.py with small commands instead of launchers."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from megatron_bipe.errors import ConfigError
from tests.helpers.paths import ROOT
from tests.helpers.tools import assert_refuses, call_tool


@pytest.fixture(autouse=True)
def signal_handlers():
    """The command installs handlers, which must not stay in this process."""
    with mock.patch("signal.signal"):
        yield


@pytest.fixture
def supervise(tmp_path, capfd):
    """A function that supervises a shell script; returns what both print."""

    def run(script, *options, code=0):
        command = (tmp_path, "--first-wait", "0s", *options, "--", "bash", "-c", script)
        ended = call_tool("supervise", *command, code=code)
        return capfd.readouterr().out + ended.output

    return run


def test_supervise_done_at_once(supervise):
    assert supervise("echo hello").startswith("hello\nsupervise: exit code 0")


def test_supervise_shows_the_goodput_that_the_last_event_has(supervise, tmp_path):
    script = f"""echo '{{"time": 1, "event": "done", "goodput": 0.875}}' >> {tmp_path}/events.jsonl"""
    assert "87.5%" in supervise(script)


def test_supervise_gives_up_after_failures_without_progress(supervise):
    output = supervise("echo try; exit 3", "--failures", 2, code=1)
    assert output.count("try") == output.count("exit code 3") == 2


def test_supervise_progress_makes_failures_count_anew(supervise, tmp_path):
    script = f"""cd {tmp_path}; echo x >> tries; n=$(wc -l < tries)
        if [ $n = 2 ]; then mkdir -p checkpoints/step-00000007; fi
        if [ $n = 4 ]; then exit 0; fi; exit 1"""
    output = supervise(script, "--failures", 2)
    assert (tmp_path / "tries").read_text() == "x\n" * 4, output


def test_supervise_a_new_checkpoint_before_a_damaged_one_is_progress(supervise, tmp_path):
    (tmp_path / "checkpoints" / "step-00001000").mkdir(parents=True)
    script = f"""cd {tmp_path}; echo x >> tries; n=$(wc -l < tries)
        mkdir -p checkpoints/step-0000090$n; echo -n step-0000090$n > checkpoints/latest; [ $n = 4 ]"""
    output = supervise(script, "--failures", 2)
    assert (tmp_path / "tries").read_text() == "x\n" * 4, output


def test_supervise_what_the_user_must_fix_is_not_tried_again(supervise):
    assert supervise("echo try; exit 2", code=2).count("try") == 1


def test_supervise_stop_is_passed_on_and_runs_what_requeues(tmp_path):
    (tmp_path / "event").write_text('{"time": 1, "event": "stop"}\n')
    script = f"cd {tmp_path}; trap 'cat event >> events.jsonl; exit 1' TERM; echo up; while :; do sleep 0.1; done"
    command = [sys.executable, "tools/supervise.py", str(tmp_path), "--on-stop", f"touch {tmp_path}/requeued"]
    process = subprocess.Popen(
        [*command, "--", "bash", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and (tmp_path / "requeued").exists(), output


@pytest.mark.parametrize(("command", "observed"), [("false", "exit code 1"), ("/no/such", "No such file")])
def test_supervise_that_what_requeues_fails_is_said_and_the_run_is_still_to_be_continued(
    supervise, tmp_path, command, observed
):
    (tmp_path / "events.jsonl").write_text("")
    script = f"""echo '{{"time": 1, "event": "stop"}}' >> {tmp_path}/events.jsonl; exit 75"""
    output = supervise(script, "--on-stop", command, code=75)
    assert "--on-stop" in output and command in output and observed in output


def test_supervise_commands_that_cannot_be_started_are_one_error(tmp_path):
    for arguments, location in (
        (["--", "/no/such"], "after --"),
        (["--hosts-command", "/no/such", "--", "true"], "--hosts-command"),
    ):
        assert_refuses("supervise", [tmp_path, *arguments], ConfigError, "/no/such", "No such file", location=location)


def test_supervise_ends_what_a_launch_leaves(supervise, tmp_path):
    output = supervise(f"sleep 300 & echo $! > {tmp_path}/pid; exit 2", code=2)
    pid = int((tmp_path / "pid").read_text())
    time.sleep(0.1)
    assert not Path(f"/proc/{pid}/exe").exists(), output


def test_supervise_fills_in_the_hosts_that_are_up(tmp_path, capfd):
    command = ["--hosts-command", "echo a b c", "--", "echo", "--nodes={nodes}", "{hosts}"]
    call_tool("supervise", tmp_path, *command)
    assert capfd.readouterr().out == "--nodes=3 a,b,c\n"


def test_supervise_too_few_hosts_is_an_error_of_the_user(tmp_path):
    command = [tmp_path, "--hosts-command", "echo a", "--least-hosts", 2, "--", "true"]
    assert_refuses("supervise", command, ConfigError, 1, "(a)", "--least-hosts", location=tmp_path)
