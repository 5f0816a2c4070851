"""Decisions of the supervisor after a launch has ended."""

import pytest

from megatron_bipe.checkpoint.find import step_folder
from megatron_bipe.config.load import dump_yaml, load_run_config
from megatron_bipe.errors import ConfigError, exit_code
from megatron_bipe.train.metrics_file import Events
from megatron_bipe.train.supervise import Next, Patience, decide, usable_hosts
from megatron_bipe.train.supervised_launch import Ended, mark, record_since
from tests.helpers.errors import raises

PATIENCE = Patience(failures=3, first_wait_s=10.0, longest_wait_s=60.0)


@pytest.mark.parametrize(
    ("code", "record", "asked", "fruitless", "expected"),
    [
        (0, "done", False, 0, Next.DONE),
        (0, "done", True, 0, Next.DONE),  # the end came before the signal
        (137, "done", False, 0, Next.DONE),  # the launcher was killed after the end
        (0, "start", False, 1, Next.AGAIN),  # deepspeed, when its inner process was killed
        (0, "", False, 3, Next.GIVE_UP),
        (75, "", False, 1, Next.LATER),
        (1, "stop", False, 1, Next.LATER),  # a launcher that does not forward exit codes
        (143, "", True, 3, Next.LATER),  # before the first step
        (2, "start", True, 1, Next.GIVE_UP),  # the last checkpoint could not be saved
        (2, "", False, 1, Next.GIVE_UP),
        (1, "start", False, 3, Next.GIVE_UP),
        (137, "start", False, 2, Next.AGAIN),
        (1, "start", False, 0, Next.AGAIN),
    ],
)
def test_decide_by_how_a_launch_ended(code, record, asked, fruitless, expected):
    assert decide(Ended(code, record), asked, fruitless, PATIENCE) is expected


@pytest.mark.parametrize(
    ("code", "name"), [(137, "SIGKILL"), (247, "SIGKILL"), (143, "SIGTERM"), (1, ""), (75, ""), (255, "")]
)
def test_exit_code_of_a_signal_is_named_also_that_of_deepspeed(code, name):
    assert Ended(code).signal_name == name and name in str(Ended(code))


def test_patience_waits_twice_as_long_each_time_up_to_a_limit():
    assert [PATIENCE.wait_s(fruitless) for fruitless in range(6)] == [10, 10, 20, 40, 60, 60]


def test_progress_mark_counts_events_and_checkpoints(tmp_path):
    assert mark(tmp_path / "absent") == (0, -1)
    Events(tmp_path, True).add("start", step=0)
    step_folder(tmp_path, 20).mkdir(parents=True)
    before = mark(tmp_path)
    assert before == (1, 20)
    assert record_since(tmp_path, before) == ""
    for event in ("start", "bad step", "stop", "failed"):
        Events(tmp_path, True).add(event, step=20)
    assert record_since(tmp_path, before) == "stop" and record_since(tmp_path, mark(tmp_path)) == ""


def test_progress_mark_after_a_damaged_checkpoint_moves_with_new_ones(tmp_path):
    for step in (900, 1000):
        step_folder(tmp_path, step).mkdir(parents=True)
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.write_text("step-00001000")
    before = mark(tmp_path)
    assert before.newest_step == 1000
    step_folder(tmp_path, 910).mkdir()
    pointer.write_text("step-00000910")
    assert mark(tmp_path).newest_step == 910 != before.newest_step


@pytest.fixture
def run_dir(tmp_path):
    run = load_run_config(None, ["train.global_batch=96", "train.micro_batch=2", "parallel.tensor=2"])
    (tmp_path / "config.yaml").write_text(dump_yaml(run))
    return tmp_path


@pytest.mark.parametrize(("up", "used"), [(8, 8), (7, 6), (6, 6), (5, 4), (4, 4), (3, 3)])
def test_usable_hosts_are_as_many_as_share_the_batch_evenly(run_dir, up, used):
    hosts = [f"node-{number}" for number in range(up)]  # 4 ranks each: 2 replicas of the model; 48 micro-batches
    assert usable_hosts(run_dir, hosts, 4, 1) == hosts[:used]


def test_usable_hosts_fewer_than_the_least_are_refused_by_name(run_dir):
    with raises(ConfigError, "2 hosts", "a, b", 3, location=run_dir, remedy="--least-hosts") as caught:
        usable_hosts(run_dir, ["a", "b"], 4, 3)
    assert exit_code(caught.value) == 1  # there were enough before, and there may be again


def test_usable_hosts_too_few_for_a_new_run_are_for_the_user_to_fix(tmp_path):
    with raises(ConfigError, "1 hosts", location=tmp_path) as caught:
        usable_hosts(tmp_path, ["a"], 4, 3)
    assert exit_code(caught.value) == 2


def test_usable_hosts_none_at_all_is_refused(run_dir):
    with raises(ConfigError, "0 hosts", location=run_dir):
        usable_hosts(run_dir, [], 4, 0)


def test_usable_hosts_before_the_run_has_begun_are_all(tmp_path):
    assert usable_hosts(tmp_path, ["a", "b", "c"], 7, 1) == ["a", "b", "c"]
