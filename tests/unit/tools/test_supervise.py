"""tools/supervise.py with small commands instead of launchers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_bipe.errors import ConfigError
from megatron_bipe.io import locked
from megatron_bipe.run_files import read_events
from megatron_bipe.runtime.child_processes import STOP_SIGNALS
from megatron_bipe.train import supervise as supervise_module
from megatron_bipe.train import supervised_launch
from megatron_bipe.train.alerts import Alerts
from tests.helpers.paths import ROOT
from tests.helpers.tools import assert_refuses, call_tool
from tests.helpers.webhook import hang, status, webhook

# Defines `record EVENT`, which appends an event to the log of the run in the working folder.
RECORD = """record() { echo '{"time": 1, "event": "'$1'"}' >> events.jsonl; }"""


@pytest.fixture(autouse=True)
def signal_handlers():
    """The command installs handlers, which must not stay in this process."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def supervise(tmp_path, capfd, monkeypatch):
    """A function that supervises a shell script in the run folder; returns what both print."""
    monkeypatch.setattr(supervised_launch, "LEAVE_S", 0.3)

    def run(script, *options, code=0):
        prepared = f"cd {tmp_path}; {RECORD}; {script}"
        command = (tmp_path, "--first-wait", "0s", *options, "--", "bash", "-c", prepared)
        ended = call_tool("supervise", *command, code=code)
        return capfd.readouterr().out + ended.output

    return run


def failures(run_dir):
    """Return the exit code, signal, attempt and wait of each failure that the supervisor recorded."""
    recorded = [event for event in read_events(run_dir) if event["event"] == "failed" and event["by"] == "supervisor"]
    return [tuple(event[key] for key in ("exit_code", "signal", "attempt", "wait_s")) for event in recorded]


def test_supervise_done_at_once(supervise, tmp_path):
    assert supervise("echo hello; record done").startswith("hello\nsupervise: exit code 0")
    assert failures(tmp_path) == []


def test_supervise_exit_code_0_is_not_the_end_of_a_run_that_has_not_recorded_it(supervise, tmp_path):
    script = "echo try; record start; [ -e second ] && record done; touch second"
    output = supervise(script)
    assert output.count("try") == 2 and "events.jsonl" in output, output
    assert failures(tmp_path) == [(0, "", 1, 0.0)]


def test_supervise_end_of_a_run_counts_whatever_became_of_its_launcher(supervise):
    assert "done" in supervise("record start; record done; kill -9 $$")


def test_supervise_command_that_trains_elsewhere_is_given_up_with_the_reason(supervise, tmp_path):
    output = supervise("echo try", "--failures", 2, code=1)
    assert output.count("try") == 2 and f"{tmp_path}/events.jsonl" in output, output


def test_supervise_shows_the_goodput_that_the_last_event_has(supervise, tmp_path):
    script = """echo '{"time": 1, "event": "done", "goodput": 0.875}' >> events.jsonl"""
    assert "87.5%" in supervise(script)


def test_supervise_gives_up_after_failures_without_progress(supervise, tmp_path):
    output = supervise("echo try; exit 3", "--failures", 2, code=1)
    assert output.count("try") == output.count("exit code 3") == 2
    assert failures(tmp_path) == [(3, "", 1, 0.0), (3, "", 2, None)]


def test_supervise_names_the_signal_and_repeats_the_first_error_of_a_rank(supervise, tmp_path):
    error = r"printf '1 ValueError: broken\0001 rank 1 leaves\0' >> $BIPE_FAILURE_FILE"
    output = supervise(f"{error}; kill -9 $$", "--failures", 1, code=1)
    assert "exit code 137 (SIGKILL)" in output and output.rstrip().endswith("supervise: ValueError: broken"), output
    assert failures(tmp_path) == [(137, "SIGKILL", 1, None)]


def test_supervise_progress_makes_failures_count_anew(supervise, tmp_path):
    script = """echo x >> tries; n=$(wc -l < tries)
        if [ $n = 2 ]; then mkdir -p checkpoints/step-00000007; fi
        if [ $n = 4 ]; then record done; fi; exit 1"""
    output = supervise(script, "--failures", 2)
    assert (tmp_path / "tries").read_text() == "x\n" * 4, output


def test_supervise_a_new_checkpoint_before_a_damaged_one_is_progress(supervise, tmp_path):
    (tmp_path / "checkpoints" / "step-00001000").mkdir(parents=True)
    script = """echo x >> tries; n=$(wc -l < tries)
        mkdir -p checkpoints/step-0000090$n; echo -n step-0000090$n > checkpoints/latest; [ $n = 4 ] && record done"""
    output = supervise(script, "--failures", 2)
    assert (tmp_path / "tries").read_text() == "x\n" * 4, output


@pytest.mark.parametrize(
    "script", ["exit 2", r"printf '2 DataError: no data\000' >> $BIPE_FAILURE_FILE; exit 1"], ids=["rank", "torchrun"]
)
def test_supervise_what_the_user_must_fix_is_not_tried_again(supervise, script):
    assert supervise(f"echo attempt; {script}", code=2).count("attempt") == 1


# What a run does when it is asked to stop -> exit code of the supervisor, and a part of its message.
STOPS = {
    "saves": ("mkdir -p checkpoints/step-00000012; record stop; exit 1", 75, "saved step 12"),
    "does not save": ("exit 1", 1, "later steps are lost"),
}


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("case", STOPS)
def test_supervise_stop_is_passed_on_and_says_whether_the_run_saved(supervise, tmp_path, case, number):
    reaction, code, said = STOPS[case]
    name = "USR1" if number == signal.SIGUSR1 else "TERM"
    script = f"trap '{reaction}' {name}; record start; touch up; while :; do sleep 0.1; done"
    with sending(tmp_path / "up", number):
        output = supervise(script, "--on-stop", f"touch {tmp_path}/requeued", code=code)
    assert said in output and (tmp_path / "requeued").exists(), output
    assert [number for number, *_ in failures(tmp_path)] == [1] * (code == 1)


@contextmanager
def sending(file, number):
    """Send a signal to this process when the file appears."""

    def send():
        while not file.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


def test_supervise_second_interrupt_ends_the_launch_at_once(supervise, tmp_path):
    script = "trap 'sleep 0.5; touch later' TERM; record start; touch up; while :; do sleep 0.1; done"
    with sending(tmp_path / "up", signal.SIGINT), sending(tmp_path / "later", signal.SIGINT):
        output = supervise(script, code=1)
    assert "SIGKILL" in output and "later steps are lost" in output


def test_supervise_hangup_is_a_request_to_stop(tmp_path):
    """Also of the real process, which by default dies of this signal."""
    script = f"cd {tmp_path}; {RECORD}; trap 'record stop; exit 1' TERM; echo up; while :; do sleep 0.1; done"
    command = [sys.executable, "tools/supervise.py", str(tmp_path), "--", "bash", "-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGHUP)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 75, output


@pytest.mark.parametrize("start", ["record start", "true"])
def test_supervise_ranks_that_a_stopped_launcher_leaves_have_the_timeout_to_save(
    supervise, tmp_path, monkeypatch, start
):
    """They are neither killed nor asked again while they save; a run that has not begun has nothing to save."""
    monkeypatch.setattr(supervised_launch, "GRACE_S", 0.3)
    (tmp_path / "config.yaml").write_text("parallel: {timeout_s: 30}")
    stop = "trap : TERM; echo x >> asked; sleep 1; echo x >> saved; record stop; exit"
    rank = f"trap '{stop}' TERM; {start}; touch up; while :; do sleep 0.1; done"
    with sending(tmp_path / "up", signal.SIGTERM):
        supervise(f"({rank}) & wait", code=75)  # bash dies of the signal
    assert (tmp_path / "asked").read_text() == "x\n"
    assert (tmp_path / "saved").exists() == (start != "true")


def test_supervise_crash_of_a_launcher_is_not_recorded_as_a_request_to_stop(supervise, tmp_path):
    """A rank that outlives its launcher gets no SIGTERM, which it would take for a request."""
    rank = "trap 'record stop; exit' TERM; record start; while :; do sleep 0.1; done"
    supervise(f"({rank}) & sleep 0.2; kill -9 $$", "--failures", 1, code=1)
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "failed"]


def test_supervise_waits_for_the_launch_that_holds_the_lock(supervise, tmp_path, monkeypatch, caplog):
    lock = locked(tmp_path / "running", lambda: None, job="SLURM job 7")
    lock.__enter__()
    (tmp_path / "metrics.jsonl").write_text('{"step": 41}\n')

    def wait(*_):
        lock.__exit__(None, None, None)

    monkeypatch.setattr(supervised_launch.Supervisor, "wait", wait)
    output = supervise("record done")
    assert all(part in output for part in (f"process {os.getpid()} on ", "SLURM job 7", "last step 41")), output


def test_supervise_hosts_command_that_fails_is_tried_again(tmp_path, capfd):
    hosts = f"bash -c 'echo x >> {tmp_path}/tries; [ $(wc -l < {tmp_path}/tries) = 2 ] && echo a'"
    command = ["--first-wait", "0s", "--hosts-command", hosts, "--", "bash", "-c", done(tmp_path), "{hosts}"]
    output = call_tool("supervise", tmp_path, *command).output
    assert "--hosts-command" in output and capfd.readouterr().out == "a\n", output


def done(run_dir):
    """Return a script that prints its arguments and is a run that ends."""
    return f"""echo $0 $@; echo '{json.dumps({"time": 1, "event": "done"})}' >> {run_dir}/events.jsonl"""


@pytest.mark.parametrize(("command", "observed"), [("false", "exit code 1"), ("/no/such", "No such file")])
def test_supervise_that_what_requeues_fails_is_said_and_the_run_is_still_to_be_continued(
    supervise, tmp_path, command, observed
):
    output = supervise("record stop; exit 75", "--on-stop", command, code=75)
    assert "--on-stop" in output and command in output and observed in output


def test_supervise_commands_that_cannot_be_started_are_one_error(tmp_path):
    for arguments, location in (
        (["--", "/no/such"], "after --"),
        (["--hosts-command", "/no/such", "--", "true"], "--hosts-command"),
    ):
        assert_refuses("supervise", [tmp_path, *arguments], ConfigError, "/no/such", "No such file", location=location)


@pytest.mark.parametrize(
    ("option", "value", "location"),
    [
        ("--failures", "0", "--failures"),
        ("--grace", "5", "--grace"),
        ("--first-wait", "1x", "--first-wait"),
        ("--longest-wait", "", "--longest-wait"),
        ("--on-stop", "say 'a", "--on-stop"),
        ("--hosts-command", "say 'a", "--hosts-command"),
    ],
)
def test_supervise_option_that_cannot_be_used_is_refused_before_the_first_launch(tmp_path, option, value, location):
    assert_refuses("supervise", [tmp_path, option, value, "--", "/no/such"], ConfigError, value, location=location)


def test_supervise_run_folder_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert_refuses("supervise", [file, "--", "/no/such"], ConfigError, "not a folder", location=file)


def test_supervise_ends_what_a_launch_leaves(supervise, tmp_path):
    output = supervise(f"sleep 300 & echo $! > {tmp_path}/pid; exit 2", code=2)
    pid = int((tmp_path / "pid").read_text())
    time.sleep(0.1)
    assert not Path(f"/proc/{pid}/exe").exists(), output


def test_supervise_fills_in_the_hosts_that_are_up(tmp_path, capfd):
    command = ["--hosts-command", "echo a b c", "--", "bash", "-c", done(tmp_path), "--nodes={nodes}", "{hosts}"]
    call_tool("supervise", tmp_path, *command)
    assert capfd.readouterr().out == "--nodes=3 a,b,c\n"


def test_supervise_too_few_hosts_is_an_error_of_the_user(tmp_path):
    command = [tmp_path, "--hosts-command", "echo a", "--least-hosts", 2, "--", "true"]
    assert_refuses("supervise", command, ConfigError, 1, "(a)", "--least-hosts", location=tmp_path)


REASON = r"printf '1 ValueError: broken\0' >> $BIPE_FAILURE_FILE"
TOLD = 'echo "$BIPE_ATTEMPT/$BIPE_EXIT_CODE/$BIPE_SIGNAL/$BIPE_REASON/$BIPE_WAIT_S/$BIPE_STEP/$BIPE_RUN_DIR" >> told'


def test_supervise_on_failure_gets_the_facts_before_the_next_launch(supervise, tmp_path):
    script = f"{REASON}; echo try >> told; mkdir -p checkpoints/step-00000007; kill -9 $$"
    supervise(script, "--on-failure", f"bash -c 'cd {tmp_path}; {TOLD}'", "--failures", 1, code=1)
    told = (tmp_path / "told").read_text().splitlines()
    facts = "137/SIGKILL/ValueError: broken"
    assert told == ["try", f"1/{facts}/0.0/7/{tmp_path}", "try", f"2/{facts}//7/{tmp_path}"]


def test_supervise_on_failure_is_not_called_for_a_run_that_is_done_or_was_asked_to_stop(supervise, tmp_path):
    supervise("record done", "--on-failure", f"touch {tmp_path}/called")
    supervise("record stop; exit 75", "--on-failure", f"touch {tmp_path}/called", code=75)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("command", ["/no/such/program", "false", "sleep 30"])
def test_supervise_on_failure_that_fails_or_hangs_is_logged_and_the_run_goes_on(
    supervise, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(supervise_module, "ON_FAILURE_LIMIT_S", 0.5)
    script = "echo x >> tries; record start; [ $(wc -l < tries) = 2 ] && record done; exit 1"
    output = supervise(script, "--on-failure", command)
    assert "--on-failure" in output and command.split()[0] in output, output
    assert (tmp_path / "tries").read_text() == "x\n" * 2


@pytest.mark.parametrize("kept", [True, False])
def test_supervise_sends_a_message_about_each_failure(supervise, tmp_path, monkeypatch, kept):
    with webhook(status(200)) as server:
        if kept:
            (tmp_path / "webhook").write_text(f"{server.url}\n")
        else:
            monkeypatch.setenv("BIPE_WEBHOOK", server.url)
        output = supervise(f"{REASON}; exit 3", "--failures", 2, code=1)
    found = [(message["event"], message["by"], message["attempt"], message["wait_s"]) for message in server.received]
    assert found == [("failed", "supervisor", 1, 0.0), ("failed", "supervisor", 2, None)]
    assert "broken" in server.received[0]["text"] and "SECRET" not in output


def test_supervise_webhook_that_hangs_does_not_stop_the_restarts(supervise, tmp_path, monkeypatch):
    monkeypatch.setattr(Alerts.close, "__defaults__", (0.1,))
    with webhook(hang) as server:
        monkeypatch.setenv("BIPE_WEBHOOK", server.url)
        output = supervise("echo try; exit 3", "--failures", 2, code=1)
    assert output.count("try") == 2 and "SECRET" not in output and "alerts.webhook" in output
