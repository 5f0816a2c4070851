"""Messages to a webhook about events of a run, sent in the background by the main rank and by the supervisor.

    POST {"text": sentence, "content": sentence, "run": name, "host": ..., "event": ..., "time": ..., further facts}

Slack, Mattermost and others show `text`, Discord shows `content`. A webhook that refuses, fails or hangs is a warning;
it neither delays training nor ends it.

The address is a secret: whoever has it can post. It is taken from `alerts.webhook` or BIPE_WEBHOOK. The supervisor,
which does not read the configuration, finds it in RUN/webhook, a file that only its owner can read; config.yaml,
checkpoints, logs and messages do not contain it.
"""

import json
import logging
import math
import os
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_bipe.config import RunConfig
from megatron_bipe.errors import ConfigError
from megatron_bipe.run_files import DONE, FAILED, START, STOP
from megatron_bipe.runtime.environment import WEBHOOK, webhook_variable
from megatron_bipe.train.metrics_file import (
    AFTER_SAVE_FAILED,
    FELL_BACK,
    RETURN,
    SAVE_FAILED,
    SLOW_RANK,
    TRACKER_FAILED,
    record_failure,
)

WEBHOOK_FILE = "webhook"  # in the run folder
ATTEMPT_TIMEOUT_S = 10.0
RETRY_PAUSES_S = (1.0, 4.0)
CLOSE_WAIT_S = 5.0  # at the end of the process, for messages that were not sent yet
SLOW_RANK_PAUSE_S = 3600.0  # between two messages about one slow rank
_MAX_WAITING = 100
_MAX_CHARACTERS = 1900  # Discord refuses more than 2000
_log = logging.getLogger(__name__)

Facts = Mapping[str, Any]
_SENTENCES: Mapping[str, Callable[[Facts], str]] = {
    START: lambda facts: f"started at step {facts['step']} on {facts['ranks']} rank{'s' * (facts['ranks'] > 1)}",
    STOP: lambda facts: f"was asked to stop, and has stopped after step {facts['step']}",
    DONE: lambda facts: f"is done: step {facts['step']}",
    RETURN: lambda facts: (
        f"rolled back from step {facts['step']} to step {facts['to_step']}, skipping samples {facts['samples'][0]} to "
        f"{facts['samples'][1] - 1}"
    ),
    SLOW_RANK: lambda facts: (
        f"{facts['name']} is slow: its compute time is {facts['own_s']:.3g} s, the median of all ranks "
        f"{facts['median_s']:.3g} s"
    ),
    SAVE_FAILED: lambda facts: f"could not save step {facts['step']}: {facts['reason']}",
    FELL_BACK: lambda facts: f"cannot use its newest checkpoints, and continues from step {facts['to_step']}",
    AFTER_SAVE_FAILED: lambda facts: f"checkpoint.after_save failed for step {facts['step']}: {facts['reason']}",
    TRACKER_FAILED: lambda facts: f"tracker {facts['tracker']} failed: {facts['reason']}",
    FAILED: lambda facts: _supervised(facts) if "by" in facts else f"failed: {facts['name']}: {facts['reason']}",
}


def _supervised(facts: Facts) -> str:
    follows = "none follows" if facts["wait_s"] is None else f"the next one follows in {facts['wait_s']:g} s"
    how = f"exit code {facts['exit_code']}{', ' * bool(facts['signal'])}{facts['signal']}"
    return f"launch {facts['attempt']} failed ({how}), and {follows}: {facts['reason'] or 'see its output'}"


class Alerts:
    """Sender of messages about events, by a thread.

    Args:
        url: address of the webhook; None: nothing is sent.
        run_dir: folder of the run, whose name the messages give.
    """

    def __init__(self, url: str | None, run_dir: Path) -> None:
        self._url, self._name = url, run_dir.resolve().name
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(_MAX_WAITING)
        self._told_s: dict[Any, float] = {}  # when a slow rank was last reported
        self._is_over, self._has_failed = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)
        if url is not None:
            self._thread.start()

    def add(self, event: Facts) -> None:
        """Send a message about an event of events.jsonl, if it is of a kind that people want to know of."""
        if self._url is None or event["event"] not in _SENTENCES or self._is_repeated(event):
            return
        try:
            self._waiting.put_nowait(message(self._name, event))
        except queue.Full:
            self._warn(f"{_MAX_WAITING} messages are waiting already")

    def close(self, limit_s: float = CLOSE_WAIT_S) -> None:
        """Wait for the messages that were not sent yet, but not long."""
        if self._url is None or not self._thread.is_alive():
            return
        with suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self._is_over.set()
            self._warn(f"it has not answered in {limit_s:g} s")

    def _is_repeated(self, event: Facts) -> bool:
        """Return True for a rank that was reported as slow a short time ago; the event log has every report."""
        if event["event"] != SLOW_RANK:
            return False
        now_s = time.monotonic()
        is_recent = now_s - self._told_s.get(event["rank"], -math.inf) < SLOW_RANK_PAUSE_S
        if not is_recent:
            self._told_s[event["rank"]] = now_s
        return is_recent

    def _run(self) -> None:
        assert self._url is not None
        while (waiting := self._waiting.get()) is not None:
            problem = _post(self._url, json.dumps(waiting).encode(), self._is_over)
            if problem and not self._is_over.is_set():
                self._warn(problem)
            elif not problem:
                self._has_failed = False

    def _warn(self, problem: str) -> None:
        if not self._has_failed:  # once in a row
            self._has_failed = True
            _log.warning("alerts.webhook does not take messages: %s. Training is not affected", problem)


def message(name: str, event: Facts) -> dict[str, Any]:
    """Return the message about an event: a sentence, and those facts that are plain values."""
    try:
        sentence = f"{name} {_SENTENCES[event['event']](event)}"
    except (LookupError, TypeError, ValueError):  # of an event that lacks some facts
        sentence = f"{name}: {event['event']}"
    if len(sentence) > _MAX_CHARACTERS:
        sentence = f"{sentence[:_MAX_CHARACTERS]} ..."
    facts = {key: value for key, value in event.items() if isinstance(value, str | int | float | None)}
    finite = {key: value for key, value in facts.items() if not (isinstance(value, float) and not math.isfinite(value))}
    return {"text": sentence, "content": sentence, "run": name, "host": socket.gethostname()} | finite


def _post(url: str, body: bytes, is_over: threading.Event) -> str:
    """Send a message, several times if needed; return why that failed, or ""."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", "User-Agent": "megatron-bipe"})
    problem = ""
    for pause_s in (*RETRY_PAUSES_S, None):
        try:
            with urllib.request.urlopen(request, timeout=ATTEMPT_TIMEOUT_S):  # the answer's body does not matter
                return ""
        except urllib.error.HTTPError as error:
            problem = f"it answered {error.code} {error.reason}"
            if error.code < 500 and error.code != 429:  # will not change
                return problem
        except Exception as error:  # http.client raises more than OSError
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            problem = f"{type(reason).__name__}: {reason}".replace(url, "(its address)")
        if pause_s is None or is_over.wait(pause_s):
            break
    return problem


def webhook_of(run: RunConfig) -> str | None:
    """Return the address for messages of a run, from its configuration or the environment; None: none.

    Raises:
        ConfigError: it is not one.
    """
    given = "" if run.alerts.webhook is None else run.alerts.webhook.get_secret_value()
    is_hidden = bool(given) and set(given) == {"*"}  # it was read from config.yaml of a run folder
    url = (None if is_hidden else given) or webhook_variable() or given
    if not url:
        return None
    location = "alerts.webhook" if url == given else WEBHOOK
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_valid = False
    if not is_valid or not url.isascii() or not url.isprintable() or " " in url:
        seen = "is hidden in config.yaml of a run folder" if is_hidden else "is not an address (not shown: a secret)"
        raise ConfigError(
            f"{location} {seen}, and must be that of a webhook",
            remedy=f"Give an address that begins with https:// or http://, or set it to null and use {WEBHOOK}",
            location=location,
        )
    return url


def keep_webhook(run: RunConfig) -> None:
    """Write the address to the run folder for the supervisor, readable by the owner only, or remove an earlier one."""
    path, url = run.run_dir / WEBHOOK_FILE, webhook_of(run)
    path.unlink(missing_ok=True)
    if url is not None:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{url}\n")


def kept_webhook(run_dir: Path) -> str | None:
    """Return the address for the supervisor of a run; None if there is none."""
    with suppress(OSError, UnicodeDecodeError):
        return (run_dir / WEBHOOK_FILE).read_text(encoding="utf-8").strip() or None
    return webhook_variable()


def record_and_alert(run: RunConfig, failure: Mapping[str, Any]) -> None:
    """Record why a launch ends, as `record_failure` does, and send a message about it."""
    try:
        url = webhook_of(run)
    except ConfigError:  # only the main rank has checked it, and BIPE_WEBHOOK may differ on this host
        url = None
    alerts = Alerts(url, run.run_dir)
    record_failure(run.run_dir, failure, alerts.add)
    alerts.close()
