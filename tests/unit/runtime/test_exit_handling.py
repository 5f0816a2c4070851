"""Exit codes and messages of a rank that fails, in a separate process."""

import errno
import os
import signal
import sys
import threading

import pytest
import torch

from megatron_bipe.errors import DataError
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.exit_handling import brief, describe, run_rank
from megatron_bipe.runtime.watchdog import Watchdog
from tests.helpers.ranks import run_programs


def _main(error, _launch):
    threading.Thread(
        target=threading.Event().wait
    ).start()  # like that of a collective: Python's own exit would wait for it
    sys.stdout.write("before")
    if error:
        raise error


def _run(error, take_output):
    if not take_output:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(reader)
    run_rank(_main, error)
    os._exit(7)


@pytest.fixture
def abort(tmp_path):
    """Return a function that raises an error in a rank's process and returns the exit code and output."""

    def run(error, take_output=True, **env):
        return run_programs(_run, [error, take_output], tmp_path, env=env)[0]

    return run


def test_run_rank_that_fails_exits_with_code_1_and_names_itself(abort):
    code, output = abort(ValueError("broken"))
    assert code == 1 and "before" in output
    assert "rank 0 of 1 on " in output and "ValueError: broken" in output and ", in _main" in output


def test_run_rank_that_fails_exits_although_its_output_pipe_is_broken(abort):
    assert abort(ValueError("broken"), take_output=False).code == 1


def test_run_rank_with_a_user_error_exits_with_code_2_and_one_message(abort):
    code, output = abort(DataError("no data", remedy="Make some", location="there"))
    assert code == 2
    assert output.replace("before", "").strip().startswith("DataError: no data. Make some.  [there]")
    assert "Traceback" not in output


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, 2), (errno.EROFS, 2), (errno.EIO, 1)])
def test_run_rank_on_a_disk_that_fails_exits_with_one_message(abort, number, expected):
    code, output = abort(OSError(number, os.strerror(number), "/run/config.yaml"))
    assert code == expected and "DataError: " in output and "[/run/config.yaml]" in output, output
    assert "Traceback" not in output


def test_run_rank_of_an_incomplete_launch_exits_with_code_2(abort):
    code, output = abort(None, RANK="1")
    assert code == 2 and "ConfigError: " in output and "RANK=1" in output


def test_run_rank_that_is_interrupted_before_training_ends_without_a_traceback(tmp_path):
    ended = run_programs(_interrupted, [], tmp_path)[0]
    assert ended == (-signal.SIGINT, "")


def _interrupted():
    run_rank(lambda *_: os.kill(os.getpid(), signal.SIGINT), None)


def test_run_rank_tells_a_supervisor_why_it_ends_in_few_words(abort, tmp_path):
    file = tmp_path / "failures"
    file.touch()
    abort(ValueError("broken"), BIPE_FAILURE_FILE=str(file))
    abort(DataError("no data"), BIPE_FAILURE_FILE=str(file))
    first, second, _ = file.read_text().split("\0")
    assert first.startswith("1 rank 0 of 1 on ") and first.endswith("ValueError: broken") and "\n" not in first
    assert second.startswith("2 DataError: no data")
    abort(ValueError("broken"), BIPE_FAILURE_FILE=str(tmp_path / "on another host"))
    assert not (tmp_path / "on another host").exists()


LOST = "[/build/gloo/pair.cc:537] Read error [::1]:4: Connection reset by peer. This is typically caused so. GLHF!"


@pytest.mark.parametrize(
    ("file", "message", "is_brief"),
    [
        ("/lib/torch/distributed/c10d.py", LOST, True),
        ("/lib/torch/distributed/c10d.py", "tensors must have the same shape", False),
        ("/lib/model.py", LOST, False),
    ],
)
def test_describe_lost_connection_is_one_line_and_other_failures_have_a_traceback(file, message, is_brief):
    try:
        exec(compile("raise RuntimeError(message)", file, "exec"), {"message": message})
    except RuntimeError as error:
        text = describe(error, "rank 0")
    assert text.startswith("rank 0 ") and message.split(". ")[0].rpartition("] ")[2] in text, text
    assert is_brief == ("\n" not in text) == ("GLHF" not in text and "Traceback" not in text), text


def test_describe_out_of_memory_names_the_settings_that_need_less():
    text = describe(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "rank 0")
    assert "9 GiB" in text and "train.micro_batch" in brief(text) and "parallel.recompute" in brief(text)


def test_run_rank_that_succeeds_returns(abort):
    assert abort(None).code == 7


def test_watchdog_yields_every_micro_batch(monkeypatch):
    mesh = Mesh(0, 0, 1, 1, "cpu")
    watchdog = Watchdog(mesh, 5, lambda timeout_s: pytest.fail("not entered"))
    assert list(watchdog.track_batches("step 1", iter("abc"))) == ["a", "b", "c"]
