"""Evaluation of a run's checkpoints as they appear, by another process than training, on this machine or another one.

    RUN/evaluations.jsonl   {"time", "step", "fingerprint", "kind", ..., "values"}: a line for each evaluation
    RUN/following/          lock of the follower, and the exported model that it evaluates; exists while it runs

All keys of a line but `time` and `values` identify the evaluation, and none is made twice. `fingerprint` is that of the
checkpoint: a run that rolled back or was repeated writes another checkpoint of the same step, which is evaluated, too.
"""

import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from megatron_bipe.checkpoint.find import Checkpoint, list_steps, step_folder
from megatron_bipe.checkpoint.manifest import fingerprint_of
from megatron_bipe.checkpoint.verify import check_complete
from megatron_bipe.errors import BipeError, CheckpointError, DataError, as_user_error, is_transient, writing
from megatron_bipe.eval.convert import export_checkpoint
from megatron_bipe.eval.eval_model import EvalModel, load_eval_model
from megatron_bipe.io import lock_holder, locked
from megatron_bipe.run_files import DONE, EVALUATIONS, TIME, is_truncated, last_record, read_events, read_lines
from megatron_bipe.runtime.environment import batch_job

Kind = Literal["perplexity", "harness", "generate"]
FOLLOWING = "following"
VALUES = "values"
ATTEMPTS = 3  # of an evaluation whose error may pass by itself
STOP_POLL_S = 0.2

_log = logging.getLogger(__name__)


class CheckpointModel:
    """The model of a checkpoint, loaded and exported when an evaluation first asks for it.

    Args:
        checkpoint: the checkpoint.
        fingerprint: its fingerprint when it was found.
        work: existing folder for the exported model.
    """

    def __init__(self, checkpoint: Checkpoint, fingerprint: str, work: Path) -> None:
        self.checkpoint, self.fingerprint = checkpoint, fingerprint
        self._output = work / checkpoint.folder.name

    @property
    def is_current(self) -> bool:
        """True if the checkpoint was neither deleted nor replaced."""
        return self.checkpoint.folder.is_dir() and fingerprint_of(self.checkpoint.folder) == self.fingerprint

    @cached_property
    def loaded(self) -> EvalModel:
        model = load_eval_model(f"{self.checkpoint.run_dir}@{self.checkpoint.step}")
        self._require_current()
        return model

    @cached_property
    def exported(self) -> Path:
        """Folder of the exported model; the memory of `loaded` is freed."""
        self.__dict__.pop("loaded", None)
        export_checkpoint(self.checkpoint, self._output, overwrite=True)
        self._require_current()
        return self._output

    def close(self) -> None:
        shutil.rmtree(self._output, ignore_errors=True)

    def _require_current(self) -> None:
        if not self.is_current:  # a part of what was read may be of the checkpoint that replaces it
            raise CheckpointError("the checkpoint changed while it was read", location=self.checkpoint.folder)


class Evaluation(NamedTuple):
    """An evaluation that is made of each checkpoint."""

    title: str
    """Name in log lines."""
    facts: Mapping[str, Any]
    """Kind, subject and settings, as a line of the file has them."""
    measure: Callable[[CheckpointModel], Mapping[str, Any]]
    """Returns the values."""


class Pace(NamedTuple):
    """Which checkpoints are evaluated, and when the follower ends."""

    every: int = 1
    """Evaluate the checkpoints of steps that are a multiple of it."""
    poll_s: float = 30.0
    """Time between two looks at the run folder."""
    once: bool = False
    """End when all checkpoints that exist now are evaluated."""
    keep_going: bool = False
    """Do not end when the run is done, since it may be continued."""


class EvaluationsFile:
    """RUN/evaluations.jsonl, to which one process appends.

    Args:
        path: the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = read_lines(path, {"step", "kind", VALUES})
        self._made = {_identity(line) for line in lines}

    def has(self, facts: Mapping[str, Any]) -> bool:
        return _identity(facts) in self._made

    def add(self, facts: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Append an evaluation, synced to the disk; numbers that are not finite become null.

        Raises:
            OSError: the disk is full, or cannot be written. What it has remains, and the log has the line.
        """
        line = orjson.dumps({TIME: time.time(), **facts, VALUES: values}) + b"\n"
        pending = b"\n" * is_truncated(self._path) + line
        try:
            with writing(self._path), self._path.open("ab", buffering=0) as file:
                while pending:  # a nearly full disk accepts only a part
                    pending = pending[file.write(pending) :]
                os.fsync(file.fileno())
        except OSError:
            _log.error("%s lacks this line: %s", self._path, line.decode().rstrip())
            raise
        self._made.add(_identity(facts))


def _identity(line: Mapping[str, Any]) -> bytes:
    facts = {key: value for key, value in line.items() if key not in (TIME, VALUES)}
    return orjson.dumps(facts, option=orjson.OPT_SORT_KEYS)


class Follower:
    """Maker of the evaluations of a run's checkpoints.

    Args:
        run_dir: folder of the run.
        evaluations: evaluations of each checkpoint, in order.
        every: only steps that are a multiple of it.
        is_stopped: returns True if no further evaluation is to begin.
    """

    def __init__(
        self, run_dir: Path, evaluations: Sequence[Evaluation], every: int, is_stopped: Callable[[], bool]
    ) -> None:
        self._run_dir, self._evaluations, self._every, self._is_stopped = run_dir, evaluations, every, is_stopped
        self._file = EvaluationsFile(run_dir / EVALUATIONS)
        self._attempts: Counter[bytes] = Counter()
        self.failed: dict[bytes, str] = {}
        """Evaluations that this process does not try again, by identity, as text."""

    def catch_up(self) -> bool:
        """Make all evaluations that can be made now, those of the oldest checkpoint first; return True if none is left.

        An evaluation that may succeed later is left.
        """
        tried: set[tuple[Checkpoint, str]] = set()
        while not self._is_stopped():
            due = self._due()
            untried = [found for found in due if found not in tried]
            if not untried:
                return not due
            tried.add(untried[0])  # retention deletes the oldest one first
            self._evaluate(CheckpointModel(*untried[0], self._run_dir / FOLLOWING))
        return False

    def _due(self) -> list[tuple[Checkpoint, str]]:
        """Return the checkpoints with evaluations to make, the oldest first, and their fingerprints."""
        found = []
        for step in list_steps(self._run_dir):
            checkpoint = Checkpoint(step_folder(self._run_dir, step), self._run_dir, step)
            fingerprint = fingerprint_of(checkpoint.folder)
            if step % self._every == 0 and self._pending(step, fingerprint):
                found.append((checkpoint, fingerprint))
        return found

    def _pending(self, step: int, fingerprint: str) -> list[tuple[Evaluation, dict[str, Any]]]:
        """Return the evaluations of a checkpoint that are to be made, and their keys in the file."""
        keyed = [(each, {"step": step, "fingerprint": fingerprint, **each.facts}) for each in self._evaluations]
        return [(each, facts) for each, facts in keyed if not self._is_settled(facts)]

    def _is_settled(self, facts: Mapping[str, Any]) -> bool:
        return self._file.has(facts) or _identity(facts) in self.failed

    def _evaluate(self, model: CheckpointModel) -> None:
        step = model.checkpoint.step
        try:
            for evaluation, facts in self._pending(step, model.fingerprint):
                if self._is_stopped():
                    return
                began_s = time.monotonic()
                try:
                    values = evaluation.measure(model)
                except Exception as error:
                    if not self._can_continue(model, evaluation, facts, error):
                        return
                else:
                    self._file.add(facts, values)
                    seconds = time.monotonic() - began_s
                    _log.info("step %d: %s: %s (%.0f s)", step, evaluation.title, as_text(values), seconds)
        finally:
            model.close()

    def _can_continue(
        self, model: CheckpointModel, evaluation: Evaluation, facts: Mapping[str, Any], error: Exception
    ) -> bool:
        """Log why an evaluation failed; return False if the checkpoint's other evaluations cannot be made either."""
        step, title = model.checkpoint.step, evaluation.title
        if not model.is_current:
            _log.info("step %d: the checkpoint was deleted or replaced meanwhile, so %s is skipped", step, title)
            return False
        if is_transient(error) and self._attempts[_identity(facts)] < ATTEMPTS - 1:
            self._attempts[_identity(facts)] += 1
            _log.warning("step %d: %s failed, and will be tried again: %s", step, title, error)
            return True
        if damage := _damage_of(model.checkpoint):
            _log.warning("step %d is skipped: %s", step, damage)
            for _, others in self._pending(step, model.fingerprint):
                self.failed[_identity(others)] = f"step {step}: {damage.message}"
            return False
        is_expected = isinstance(as_user_error(error), BipeError)
        _log.warning("step %d: %s failed: %s", step, title, error, exc_info=None if is_expected else error)
        self.failed[_identity(facts)] = f"step {step}: {title}"
        return True


def _damage_of(checkpoint: Checkpoint) -> CheckpointError | None:
    """Return why a checkpoint cannot be used; None if all its files are as they were written."""
    try:
        check_complete(checkpoint)
    except CheckpointError as error:
        return error
    return None


def follow(
    run_dir: Path, evaluations: Sequence[Evaluation], pace: Pace, is_stopped: Callable[[], bool]
) -> tuple[str, ...]:
    """Make the evaluations of each checkpoint until the run is done or a stop is requested.

    Args:
        run_dir: folder of the run.
        evaluations: evaluations of each checkpoint, in order.
        pace: which checkpoints are evaluated, and when this ends.
        is_stopped: returns True if no further evaluation is to begin.

    Returns:
        What failed, each once; the next call tries it again.

    Raises:
        DataError: another follower evaluates the run (transient), or the results cannot be written.
    """
    with _only_follower(run_dir):
        follower = Follower(run_dir, evaluations, pace.every, is_stopped)
        while not is_stopped():
            is_last = pace.once or (not pace.keep_going and last_record(read_events(run_dir)) == DONE)
            if follower.catch_up() and is_last:  # the run recorded its end after its last checkpoint
                break
            _wait(pace.poll_s, is_stopped)
        return tuple(dict.fromkeys(follower.failed.values()))


@contextmanager
def _only_follower(run_dir: Path) -> Iterator[None]:
    folder = run_dir / FOLLOWING
    if holder := lock_holder(folder):
        raise DataError(
            f"another follower evaluates this run: {holder}",
            remedy="Stop it, or let it make these evaluations, too",
            location=run_dir,
            transient=True,
        )
    with locked(folder, lambda: _remove_exports(folder), output=run_dir, job=batch_job()):
        yield


def _remove_exports(folder: Path) -> None:
    """Remove models that a killed follower has left."""
    for path in [path for path in folder.iterdir() if path.is_dir()]:
        shutil.rmtree(path, ignore_errors=True)


def _wait(seconds: float, is_stopped: Callable[[], bool]) -> None:
    end_s = time.monotonic() + seconds
    while not is_stopped() and (left_s := end_s - time.monotonic()) > 0:
        time.sleep(min(STOP_POLL_S, left_s))


def as_text(values: Mapping[str, Any]) -> str:
    """Return values as a part of a log line."""
    shown = {key: f"{value:.6g}" if isinstance(value, float) else repr(value) for key, value in values.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items())
