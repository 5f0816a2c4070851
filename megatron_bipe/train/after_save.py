"""The command `checkpoint.after_save`, which runs in the background after each checkpoint, for example to upload it.

    BIPE_RUN_DIR=/data/runs/a  BIPE_CHECKPOINT=/data/runs/a/checkpoints/step-00001000  BIPE_STEP=1000

Commands run one at a time, in the order of the checkpoints. Retention does not delete the checkpoint that a command is
working on. One that waits for its turn may be deleted, and is then skipped: a command that is slower than the saves, or
hangs, must not fill the disk, which would end the run.
"""

import logging
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from megatron_bipe.checkpoint.find import step_folder
from megatron_bipe.runtime.child_processes import ChildProcess

POLL_S = 0.2
_SHOWN_CHARACTERS = 300  # of the end of a failed command's output
_log = logging.getLogger(__name__)


class AfterSave:
    """Runner of a shell command after each checkpoint; only the main rank has one.

    Args:
        command: the shell command.
        run_dir: folder of the run.
        on_failure: called in the background with the step and the reason of each failure.
    """

    def __init__(self, command: str, run_dir: Path, on_failure: Callable[[int, str], None]) -> None:
        self._command, self._run_dir, self._on_failure = command, run_dir.resolve(), on_failure
        self._steps: queue.Queue[int | None] = queue.Queue()
        self._current: int | None = None  # step whose checkpoint the command is working on
        self._must_stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="after save", daemon=True)
        self._thread.start()

    def submit(self, step: int) -> None:
        """Run the command for the published checkpoint of `step`, after those of earlier ones."""
        self._steps.put(step)

    def steps_in_use(self) -> Collection[int]:
        """Return the step whose checkpoint must not be deleted, if there is one."""
        return () if self._current is None else (self._current,)

    def close(self, limit_s: float, heartbeat: Callable[[], None]) -> None:
        """Wait for all commands; after the limit, end the current one and skip the others.

        Args:
            limit_s: limit in seconds.
            heartbeat: called while waiting.
        """
        self._steps.put(None)
        deadline_s = time.monotonic() + limit_s
        is_announced = False
        while self._thread.is_alive():
            heartbeat()
            self._thread.join(POLL_S)
            if self._current is not None and not is_announced:
                is_announced = True
                _log.info("waiting for checkpoint.after_save of step %d, at most %g s", self._current, limit_s)
            if time.monotonic() > deadline_s:
                self._must_stop.set()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            self._current = step
            reason = "the run ended before its turn" if self._must_stop.is_set() else self._run_for(step)
            self._current = None
            if reason:
                text = "step %d | checkpoint.after_save failed: %s. Training is not affected.  [%s]"
                _log.warning(text, step, reason, step_folder(self._run_dir, step))
                self._on_failure(step, reason)

    def _run_for(self, step: int) -> str:
        """Run the command for one checkpoint; return why it failed, or ""."""
        folder = step_folder(self._run_dir, step)
        if not folder.exists():
            return "the checkpoint was deleted before its turn; keep more with checkpoint.keep_last"
        env = {"BIPE_RUN_DIR": str(self._run_dir), "BIPE_CHECKPOINT": str(folder), "BIPE_STEP": str(step)}
        try:
            with tempfile.TemporaryFile() as output:
                with ChildProcess(["/bin/sh", "-c", self._command], env, stdout=output, stderr=output) as child:
                    while (code := child.process.poll()) is None and not self._must_stop.wait(POLL_S):
                        pass
                return "" if code == 0 else _describe(code, output.read() if output.seek(0) == 0 else b"")
        except OSError as error:
            return f"{type(error).__name__}: {error}"


def _describe(code: int | None, output: bytes) -> str:
    how = "it took too long at the end of the run, and was ended" if code is None else f"exit code {code}"
    shown = output.decode(errors="replace").strip()[-_SHOWN_CHARACTERS:]
    return f"{how}: {shown}" if shown else how
