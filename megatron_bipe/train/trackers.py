"""Sinks that receive the metrics of a run: TensorBoard, and experiment trackers, which are written in the background.

metrics.jsonl is the truth. A tracker's thread reads it as it grows, so that training never waits for a tracker, and a
slow one loses nothing. Steps that a resumed or rolled-back run repeats must not appear twice, but neither trackio nor
Weights & Biases can take back what they have received, so both get the complete history again: trackio's rows of this
run are replaced, and Weights & Biases gets a new run in the same group (decision 0043).

A tracker that fails is one warning and one event; it gets the complete history again at the next start of the run.
"""

import hashlib
import logging
import math
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from megatron_bipe.config import RunConfig, TrackerConfig
from megatron_bipe.errors import ConfigError
from megatron_bipe.run_files import TIME
from megatron_bipe.train.metrics_file import Line, read_lines_between

CLOSE_WAIT_S = 10.0  # at the end of a launch, for a tracker to receive the last lines
PAUSE_S = 1.0  # in which lines collect, so that the thread seldom competes with the loop
_WANDB_INIT_TIMEOUT_S = 30.0  # the end of the process waits for it, too
_BATCH_LINES = 1000  # of a history that is sent at once
_log = logging.getLogger(__name__)
T = TypeVar("T")


class History(NamedTuple):
    """The lines of metrics.jsonl that count when a run starts, resumes or rolls back."""

    path: Path
    step: int
    """Last step; later ones of an earlier attempt no longer count."""
    num_bytes: int
    """Size of these lines, which begin the file."""
    last_lines: Sequence[Line]
    """Lines of `step`."""

    def lines(self) -> Iterator[Line]:
        """Read all lines."""
        return (line for line, _ in read_lines_between(self.path, 0, self.num_bytes))


class Sink(Protocol):
    """Receiver of the lines of metrics.jsonl, in order."""

    def begin(self, history: History) -> None:
        """Continue after a history; lines received earlier that are not in it no longer count."""

    def write(self, lines: Sequence[Line]) -> None:
        """Add the next lines, which metrics.jsonl already has."""

    def close(self) -> None:
        """Finish; nothing follows."""


def scalars(line: Line) -> dict[str, float]:
    """Return the values of a line by name; a list becomes one value for each index, and null is not a number."""
    values: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, list):
            values |= {f"{key}/{index:02d}": _number(item) for index, item in enumerate(value)}
        elif key not in ("step", TIME):
            values[key] = _number(value)
    return values


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def check_trackers(run: RunConfig) -> None:
    """Check that the configured trackers are installed.

    Raises:
        ConfigError: one is not.
    """
    for name in _configured(run):
        if find_spec(name) is None:
            raise ConfigError(
                f"tracking.{name} is set, and the package {name} is not installed",
                remedy=f"Install it with: pip install -e '.[{name}]', or set tracking.{name} to null",
                location=f"tracking.{name}",
            )


def open_trackers(run: RunConfig, on_failure: Callable[[str, str], None]) -> "list[InBackground]":
    """Return the configured trackers; call it on the main rank.

    Args:
        run: the run configuration.
        on_failure: called in a tracker's thread with its name and a reason, once it has failed.
    """
    return [InBackground(name, _SINKS[name](run, config), on_failure) for name, config in _configured(run).items()]


def _configured(run: RunConfig) -> dict[str, TrackerConfig]:
    trackers = {"trackio": run.tracking.trackio, "wandb": run.tracking.wandb}
    return {name: config for name, config in trackers.items() if config is not None}


class InBackground:
    """A sink whose work is done by a thread, which reads metrics.jsonl itself.

    Args:
        name: name of the sink, for messages.
        sink: only the thread uses it.
        on_failure: as in `open_trackers`.
    """

    def __init__(self, name: str, sink: Sink, on_failure: Callable[[str, str], None]) -> None:
        self._name, self._sink, self._on_failure = name, sink, on_failure
        self._history: History | None = None  # of the last `begin`
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)

    def begin(self, history: History) -> None:
        self._history = history
        self._wake.set()
        if not self._thread.ident:
            self._thread.start()

    def write(self, lines: Sequence[Line]) -> None:  # noqa: ARG002  # the thread reads the file
        self._wake.set()

    def close(self) -> None:
        """Wait for the thread to send the last lines, but not long."""
        self._closing.set()
        self._wake.set()
        self._thread.join(CLOSE_WAIT_S)
        if self._thread.is_alive():
            text = "%s has not received all metrics after %g s; metrics.jsonl has them, and the next start sends them"
            _log.warning(text, self._name, CLOSE_WAIT_S)

    def _run(self) -> None:
        try:
            self._follow()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0].rstrip(": .")
            text = "%s has failed and receives nothing more from this launch: %s. Training continues"
            _log.warning(text, self._name, reason)
            self._on_failure(self._name, reason)

    def _follow(self) -> None:
        current, position = None, 0
        while True:
            self._wake.wait()
            self._closing.wait(PAUSE_S)
            self._wake.clear()
            is_closing, history = self._closing.is_set(), self._history  # set before the thread was woken
            assert history is not None
            if history is not current:
                self._sink.begin(history)
                current, position = history, history.num_bytes
            for batch in _batches(read_lines_between(history.path, position)):
                if self._history is not history:  # the file has been truncated meanwhile
                    break
                self._sink.write([line for line, _ in batch])
                position = batch[-1][1]
            if is_closing:
                self._sink.close()
                return


class TrackioSink:
    """The run in trackio's database on this machine, with the time of each line.

    The rows are written at once by the storage class behind trackio's interface, since the interface itself hides
    errors, cannot replace a run, and gives all lines of a history the current time.
    """

    def __init__(self, run: RunConfig, config: TrackerConfig) -> None:
        self._project, self._name = config.project, run_name(run, config)
        self._run_id, self._config = _folder_id(run), run.model_dump(mode="json")

    def begin(self, history: History) -> None:
        from trackio.sqlite_storage import SQLiteStorage  # slow

        self._storage = SQLiteStorage
        SQLiteStorage.delete_run(self._project, self._name, run_id=self._run_id)
        if SQLiteStorage.get_log_count(self._project, self._name, run_id=self._run_id):  # errors are hidden there
            raise OSError("the rows of earlier attempts cannot be deleted")
        for batch in _batches(history.lines()):
            self.write(batch)

    def write(self, lines: Sequence[Line]) -> None:
        self._storage.bulk_log(
            self._project,
            self._name,
            [scalars(line) for line in lines],
            steps=[line["step"] for line in lines],
            timestamps=[datetime.fromtimestamp(line.get(TIME, 0), UTC).isoformat() for line in lines],
            config=self._config,
            run_id=self._run_id,
        )

    def close(self) -> None:
        pass  # every batch is on the disk


class WandbSink:
    """Runs of Weights & Biases in one group: each start and rollback begins a new one with the complete history."""

    def __init__(self, run: RunConfig, config: TrackerConfig) -> None:
        self._folder, self._name, self._project = run.run_dir, run_name(run, config), config.project
        self._id, self._config = _folder_id(run), run.model_dump(mode="json")
        self._run: Any = None

    def begin(self, history: History) -> None:
        import wandb  # slow

        if self._run is not None:
            self._run.tags = (*(self._run.tags or ()), "superseded")
            self._run.finish()
        settings = wandb.Settings(
            console="off",  # the output of the rank is not captured
            disable_git=True,
            login_timeout=int(CLOSE_WAIT_S),
            init_timeout=_WANDB_INIT_TIMEOUT_S,
            finish_timeout=CLOSE_WAIT_S,
            quiet=True,  # no summary of the metrics at the end
            x_disable_stats=True,
        )
        self._run = wandb.init(
            project=self._project,
            name=self._name,
            group=self._name,
            id=f"{self._id}-{uuid.uuid4().hex[:8]}",
            dir=self._folder,
            config=self._config,
            settings=settings,
        )
        self.write(history.lines())

    def write(self, lines: Sequence[Line] | Iterator[Line]) -> None:
        for line in lines:
            self._run.log(scalars(line) | {"_timestamp": line.get(TIME, 0)}, step=line["step"])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


_SINKS: Mapping[str, Callable[[RunConfig, TrackerConfig], Sink]] = {"trackio": TrackioSink, "wandb": WandbSink}


def _batches(items: Iterator[T]) -> Iterator[list[T]]:
    return iter(lambda: list(islice(items, _BATCH_LINES)), [])


def run_name(run: RunConfig, config: TrackerConfig) -> str:
    """Return the name of a run in a tracker."""
    return config.name or run.run_dir.resolve().name


def _folder_id(run: RunConfig) -> str:
    """Return an identifier of the run folder, since several runs may have one name."""
    return hashlib.sha256(str(run.run_dir.resolve()).encode()).hexdigest()[:16]
