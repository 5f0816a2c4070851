"""tools/supervise.py around small commands in place of launchers."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.commands import ROOT


def _start(run_dir, script, *options):
    command = [sys.executable, str(ROOT / "tools" / "supervise.py"), str(run_dir), "--first-wait", "0s", *options]
    return subprocess.Popen(
        [*command, "--", "bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _supervise(run_dir, script, *options):
    process = _start(run_dir, script, *options)
    return process.communicate(timeout=120)[0], process.returncode


def test_supervise_done_at_once(tmp_path):
    assert _supervise(tmp_path, "echo hello") == ("hello\nsupervise: exit code 0: the run is done\n", 0)


def test_supervise_shows_the_goodput_that_the_last_event_has(tmp_path):
    script = f"""echo '{{"time": 1, "event": "done", "goodput": 0.875}}' >> {tmp_path}/events.jsonl"""
    assert "the run is done (goodput 87.5% since the first start)" in _supervise(tmp_path, script)[0]


def test_supervise_gives_up_after_failures_without_progress(tmp_path):
    output, code = _supervise(tmp_path, "echo try; exit 3", "--failures", "2")
    assert code == 1 and output.count("try") == 2 and "2 launches in a row without a new checkpoint" in output


def test_supervise_progress_makes_failures_count_anew(tmp_path):
    script = f"""cd {tmp_path}; echo x >> tries; n=$(wc -l < tries)
        if [ $n = 2 ]; then mkdir -p checkpoints/step-00000007; fi
        if [ $n = 4 ]; then exit 0; fi; exit 1"""
    output, code = _supervise(tmp_path, script, "--failures", "2")
    assert code == 0 and (tmp_path / "tries").read_text() == "x\n" * 4, output


def test_supervise_a_new_checkpoint_before_a_damaged_one_is_progress(tmp_path):
    (tmp_path / "checkpoints" / "step-00001000").mkdir(parents=True)
    script = f"""cd {tmp_path}; echo x >> tries; n=$(wc -l < tries)
        mkdir -p checkpoints/step-0000090$n; echo -n step-0000090$n > checkpoints/latest; [ $n = 4 ]"""
    output, code = _supervise(tmp_path, script, "--failures", "2")
    assert code == 0 and (tmp_path / "tries").read_text() == "x\n" * 4, output


def test_supervise_what_the_user_must_fix_is_not_tried_again(tmp_path):
    output, code = _supervise(tmp_path, "echo try; exit 2")
    assert code == 2 and output.count("try") == 1


def test_supervise_stop_is_passed_on_and_runs_what_requeues(tmp_path):
    (tmp_path / "event").write_text('{"time": 1, "event": "stop"}\n')
    script = f"cd {tmp_path}; trap 'cat event >> events.jsonl; exit 1' TERM; echo up; while :; do sleep 0.1; done"
    process = _start(tmp_path, script, "--on-stop", f"touch {tmp_path}/requeued")
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and (tmp_path / "requeued").exists(), output


def test_supervise_that_what_requeues_fails_is_said_and_the_run_is_still_to_be_continued(tmp_path):
    (tmp_path / "events.jsonl").write_text("")
    script = f"""echo '{{"time": 1, "event": "stop"}}' >> {tmp_path}/events.jsonl; exit 75"""
    output, code = _supervise(tmp_path, script, "--on-stop", "false")
    assert code == 75 and "--on-stop ['false'] left with exit code 1" in output, output
    output, code = _supervise(tmp_path, script, "--on-stop", "/no/such")
    assert code == 75 and "'/no/such' cannot be started: No such file" in output, output


def test_supervise_commands_that_are_none_are_one_error(tmp_path):
    for arguments in (["--", "/no/such"], ["--hosts-command", "/no/such", "--", "true"]):
        command = [sys.executable, str(ROOT / "tools" / "supervise.py"), str(tmp_path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "'/no/such' cannot be started: No such file" in done.stderr
        assert "Traceback" not in done.stderr


def test_supervise_ends_what_a_launch_leaves(tmp_path):
    output, code = _supervise(tmp_path, f"sleep 300 & echo $! > {tmp_path}/pid; exit 2")
    pid = int((tmp_path / "pid").read_text())
    time.sleep(0.1)
    assert code == 2 and not Path(f"/proc/{pid}/exe").exists(), output


def test_supervise_fills_in_the_hosts_that_are_up(tmp_path):
    tool = [sys.executable, str(ROOT / "tools" / "supervise.py"), str(tmp_path)]
    process = subprocess.run(
        [*tool, "--hosts-command", "echo a b c", "--", "echo", "--nodes={nodes}", "{hosts}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == "--nodes=3 a,b,c\n"


def test_supervise_too_few_hosts_is_an_error_of_the_user(tmp_path):
    tool = [sys.executable, str(ROOT / "tools" / "supervise.py"), str(tmp_path)]
    process = subprocess.run(
        [*tool, "--hosts-command", "echo a", "--least-hosts", "2", "--", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2 and "1 hosts are up (a)" in process.stderr
