"""Requests to stop: their sources, and the agreement of all ranks."""

import os
import signal

import pytest

from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.child_processes import STOP_SIGNALS
from megatron_bipe.runtime.preemption import StopRequest, parse_duration
from tests.helpers.errors import raises


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_request_records_a_signal(handlers, number):
    request = StopRequest()
    request.install_handlers()
    assert not request.poll() and request.reason == ""
    os.kill(os.getpid(), number)
    assert request.reason == number.name and request.poll() and request.is_agreed


def test_stop_request_with_removed_handlers_is_not_ended_by_a_signal(handlers):
    request = StopRequest()
    request.install_handlers()
    request.remove_handlers()
    ignored = {number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_IGN}
    assert ignored == {signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}  # a second SIGINT still ends the process
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.reason == ""


def test_stop_request_leaves_sighup_ignored_as_under_nohup(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopRequest().install_handlers()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_stop_request_second_interrupt_ends_the_process_but_not_two_signals_of_one(handlers, monkeypatch, capfd):
    now, codes = [0.0], []
    monkeypatch.setattr(os, "_exit", codes.append)
    request = StopRequest(clock=lambda: now[0])
    request.install_handlers()
    for now[0], expected in ((1.0, []), (1.1, []), (3.0, [130])):
        os.kill(os.getpid(), signal.SIGINT)
        assert codes == expected and request.reason == "SIGINT"
    assert "without saving" in capfd.readouterr().err


def test_stop_request_obeys_a_time_limit():
    now = [0.0]
    request = StopRequest(10.0, lambda: now[0])
    assert not request.poll()
    now[0] = 10.0
    assert request.poll() and request.reason == "--stop-at"


def test_stop_request_of_another_rank_is_agreed_and_stays_so():
    answers = iter([False, True])
    request = StopRequest()
    request.agree_by(lambda here: next(answers) or here)
    assert [request.poll() for _ in range(3)] == [False, True, True]
    assert request.reason == ""


def test_stop_request_until_gives_at_least_one_item():
    request = StopRequest(-1.0)
    assert list(request.until(range(5))) == [0]
    assert list(StopRequest().until(range(5))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "seconds"), [("23h50m", 85800), ("90m", 5400), ("1d12h", 129600), ("45s", 45), ("1d2h30m5s", 95405)]
)
def test_parse_duration_adds_units_up(text, seconds):
    assert parse_duration(text, "--stop-at") == seconds


@pytest.mark.parametrize("text", ["", "10", "50m23h", "1.5h", "-1h", "1h ", "h"])
def test_parse_duration_of_something_else_is_refused(text):
    with raises(ConfigError, f"'{text}'", location="--grace"):
        parse_duration(text, "--grace")
