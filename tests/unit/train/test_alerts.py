"""Messages to a webhook arrive, and a webhook that does not work neither delays nor ends a run."""

import json
import socket
import stat

import pytest

from megatron_bipe.config.load import dump_yaml, load_run_config
from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.training_facts import recipe
from megatron_bipe.run_files import read_events
from megatron_bipe.runtime.preemption import StopRequest
from megatron_bipe.train import alerts, metrics_file
from megatron_bipe.train.alerts import Alerts, keep_webhook, kept_webhook, message, record_and_alert, webhook_of
from megatron_bipe.train.metrics_file import Events
from megatron_bipe.train.profile import Profile
from megatron_bipe.train.trainer import Trainer
from tests.helpers.errors import assert_warned, raises
from tests.helpers.loop import MAIN, Notes
from tests.helpers.webhook import hang, slow_body, status, webhook

START = {"step": 3, "ranks": 2}
SUPERVISED = {"by": "supervisor", "exit_code": 137, "signal": "SIGKILL", "reason": "", "attempt": 2, "wait_s": None}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(alerts, "RETRY_PAUSES_S", (0.01, 0.01))
    monkeypatch.delenv("BIPE_WEBHOOK", raising=False)


def send(url, folder, *events, limit_s=20.0):
    sender = Alerts(url, folder)
    log = Events(folder, True, sender.add)
    for event, facts in events:
        log.add(event, **facts)
    sender.close(limit_s)


def test_alert_is_a_sentence_with_the_facts_of_the_event(tmp_path):
    with webhook(status(200)) as server:
        send(server.url, tmp_path, ("start", START), ("validation", {"step": 4, "loss_nats": 2.0}))
    [received] = server.received  # validations are not sent
    assert received["text"] == received["content"] and tmp_path.name in received["text"] and "3" in received["text"]
    assert (received["run"], received["event"], received["step"]) == (tmp_path.name, "start", 3)
    assert received["time"] == read_events(tmp_path)[0]["time"] and received["type"] == "application/json"
    assert (received["host"], received["path"]) == (socket.gethostname(), "/services/SECRET")


@pytest.mark.parametrize(
    ("event", "facts", "shown"),
    [
        ("stop", {"step": 40, "goodput": 0.5}, ["40"]),
        ("done", {"step": 90, "goodput": 0.5}, ["90"]),
        ("return", {"step": 52, "to_step": 50, "samples": [96, 128]}, ["52", "50", "96", "127"]),
        ("slow rank", {"rank": 5, "name": "rank 5 on b", "own_s": 3.0, "median_s": 1.5, "steps": 9}, ["rank 5 on b"]),
        ("save failed", {"step": 7, "reason": "disk full"}, ["7", "disk full"]),
        ("fell back", {"to_step": 7, "skipped": [{"step": 9}]}, ["7"]),
        ("after save failed", {"step": 7, "reason": "exit code 3"}, ["7", "exit code 3"]),
        ("tracker failed", {"tracker": "wandb", "reason": "no key"}, ["wandb", "no key"]),
        ("failed", {"rank": 1, "name": "rank 1 on b", "at": "x", "reason": "ValueError", "seen": []}, ["rank 1 on b"]),
        ("failed", SUPERVISED, ["launch 2", "137", "SIGKILL", "none follows"]),
        ("failed", SUPERVISED | {"wait_s": 20.0, "reason": "port"}, ["20 s", "port"]),
        ("failed", {"rank": 1}, ["failed"]),  # an event that lacks facts is sent, too
    ],
)
def test_alert_sentence_shows_the_facts_of_each_event(event, facts, shown):
    sent = message("a", {"time": 1.0, "event": event} | facts)
    assert [part for part in shown if part not in sent["text"]] == [] and sent["text"].startswith("a")
    assert json.dumps(sent, allow_nan=False) and not any(isinstance(value, list | dict) for value in sent.values())


def test_alert_of_a_long_reason_or_a_value_that_is_not_finite_is_one_that_webhooks_accept():
    sent = message("a", {"event": "save failed", "step": 7, "reason": "x" * 5000, "loss": float("nan")})
    assert len(sent["content"]) < 2000 and "loss" not in sent
    assert json.dumps(sent, allow_nan=False)


def test_alert_slow_rank_is_sent_once_in_a_while(tmp_path, monkeypatch):
    slow = [("slow rank", {"rank": rank, "name": f"{rank}", "own_s": 2.0, "median_s": 1.0}) for rank in (1, 1, 2)]
    with webhook(status(200)) as server:
        send(server.url, tmp_path, *slow)
        monkeypatch.setattr(alerts, "SLOW_RANK_PAUSE_S", 0.0)
        send(server.url, tmp_path, *slow)
    assert [received["rank"] for received in server.received] == [1, 2, 1, 1, 2]
    assert len(read_events(tmp_path)) == 6


def test_alert_is_tried_again_after_an_error_of_the_server(tmp_path, caplog):
    codes = [500, 429, 200]
    with webhook(lambda handler: status(codes.pop(0))(handler)) as server:
        send(server.url, tmp_path, ("start", START))
    assert len(server.received) == 3 and codes == [] and caplog.records == []


@pytest.mark.parametrize(("code", "tries"), [(500, 3), (404, 1)])
def test_alert_that_is_refused_is_one_warning_without_the_address(tmp_path, caplog, code, tries):
    with webhook(status(code)) as server:
        send(server.url, tmp_path, ("start", START), ("stop", {"step": 4}))
    assert len(server.received) == 2 * tries
    assert_warned(caplog, code)
    assert len(caplog.records) == 1 and "SECRET" not in caplog.text
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "stop"]


def test_alert_to_a_port_that_refuses_is_a_warning_without_the_address(tmp_path, caplog, free_port):
    send(f"http://127.0.0.1:{free_port()}/services/SECRET", tmp_path, ("start", START))
    assert_warned(caplog, "ConnectionRefusedError")
    assert "SECRET" not in caplog.text


def test_alert_to_a_webhook_that_hangs_delays_neither_an_event_nor_the_end(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(alerts, "_MAX_WAITING", 3)
    with webhook(hang) as server:
        send(server.url, tmp_path, *[("stop", {"step": step}) for step in range(9)], limit_s=0.1)
        assert server.num_released == 0  # no answer was waited for
    assert len(read_events(tmp_path)) == 9 and len(server.received) == 1
    assert_warned(caplog, 3)
    assert len(caplog.records) == 1 and "SECRET" not in caplog.text


def test_alert_attempt_to_a_webhook_that_hangs_ends(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(alerts, "ATTEMPT_TIMEOUT_S", 0.05)
    with webhook(hang) as server:
        send(server.url, tmp_path, ("start", START))
    assert len(server.received) == 3
    assert_warned(caplog, "Timeout")


def test_alert_whose_answer_has_a_slow_body_is_sent(tmp_path, caplog):
    with webhook(slow_body) as server:
        send(server.url, tmp_path, ("start", START), ("stop", {"step": 4}), limit_s=5.0)
        assert [received["event"] for received in server.received] == ["start", "stop"]
    assert caplog.records == []


def test_alert_of_a_failure_is_sent_before_the_process_ends_also_while_the_disk_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file, "RECORD_WAIT_S", 0.05)
    with webhook(status(200)) as server:
        run = load_run_config(None, [f"run_dir={tmp_path}", f"alerts.webhook={server.url}"])
        monkeypatch.setattr(metrics_file.LogFile, "write", lambda *_, **__: server.released.wait(20))
        record_and_alert(run, {"rank": 1, "name": "rank 1 on b", "reason": "ValueError: x"})
        assert [(received["event"], received["rank"]) for received in server.received] == [("failed", 1)]


def test_failure_is_recorded_where_no_address_is_usable(tmp_path, monkeypatch):
    monkeypatch.setenv("BIPE_WEBHOOK", "host/without-scheme")  # on this host; the main rank has another one
    record_and_alert(load_run_config(None, [f"run_dir={tmp_path}"]), {"rank": 1, "name": "b", "reason": "x"})
    assert [(event["event"], event["rank"]) for event in read_events(tmp_path)] == [("failed", 1)]


def test_alert_events_of_a_complete_run_are_sent_by_the_main_rank_only(tmp_path, caplog, monkeypatch):
    def train(folder, mesh, url):
        folder.mkdir()
        run = load_run_config(
            None, [f"run_dir={folder}", "train.steps=2", "train.precision=fp32", f"alerts.webhook={url}"]
        )
        notes = Notes(folder)
        assert Trainer(run, mesh, notes, notes, notes, StopRequest(), Profile(0, folder, mesh)).run(2)

    with webhook(status(200)) as server:
        train(tmp_path / "a", MAIN, server.url)
        train(tmp_path / "c", MAIN._replace(rank=1), server.url)
        assert [received["event"] for received in server.received] == ["start", "done"]
    monkeypatch.setattr(Alerts.close, "__defaults__", (0.1,))
    with webhook(hang) as server:
        train(tmp_path / "b", MAIN, server.url)
        assert server.num_released == 0
    assert_warned(caplog, "0.1 s")


@pytest.mark.parametrize(
    "url",
    ["hooks.slack.com/SECRET", "file:///etc/SECRET", "https:///SECRET", "https://a b/SECRET", "http://a:x/SECRET"],
)
def test_alert_address_that_is_none_is_refused_and_not_shown(url, monkeypatch):
    run = load_run_config(None, [f"alerts.webhook='{url}'"])
    with raises(ConfigError, "alerts.webhook", location="alerts.webhook", remedy="https://") as caught:
        webhook_of(run)
    assert "SECRET" not in str(caught.value)
    monkeypatch.setenv("BIPE_WEBHOOK", url)
    with raises(ConfigError, "BIPE_WEBHOOK", location="BIPE_WEBHOOK") as caught:
        webhook_of(load_run_config(None))
    assert "SECRET" not in str(caught.value)


def test_alert_address_is_secret_and_the_supervisor_can_read_it(tmp_path, monkeypatch):
    run = load_run_config(None, [f"run_dir={tmp_path}", "alerts.webhook=https://a/SECRET"])
    assert webhook_of(run) == "https://a/SECRET"
    public = [dump_yaml(run), repr(run), run.model_dump_json(), json.dumps(recipe(run))]
    assert [text for text in public if "SECRET" in text] == []
    keep_webhook(run)
    file = tmp_path / "webhook"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and kept_webhook(tmp_path) == "https://a/SECRET"
    monkeypatch.setenv("BIPE_WEBHOOK", "https://b/OTHER")
    assert webhook_of(run) == "https://a/SECRET" and kept_webhook(tmp_path) == "https://a/SECRET"
    keep_webhook(load_run_config(None, [f"run_dir={tmp_path}"]))
    assert kept_webhook(tmp_path) == "https://b/OTHER"
    monkeypatch.delenv("BIPE_WEBHOOK")
    keep_webhook(load_run_config(None, [f"run_dir={tmp_path}"]))
    assert not file.exists() and kept_webhook(tmp_path) is None


def test_alert_address_hidden_in_config_yaml_is_replaced_or_refused(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(load_run_config(None, ["alerts.webhook=https://a/SECRET"])))
    hidden = load_run_config(path)
    with raises(ConfigError, "hidden", location="alerts.webhook", remedy="BIPE_WEBHOOK"):
        webhook_of(hidden)
    monkeypatch.setenv("BIPE_WEBHOOK", "https://b/OTHER")
    assert webhook_of(hidden) == "https://b/OTHER"


def test_alerts_without_an_address_do_nothing(tmp_path):
    send(None, tmp_path, ("start", START))
    assert len(read_events(tmp_path)) == 1
