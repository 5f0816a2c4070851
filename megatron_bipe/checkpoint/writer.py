"""Write checkpoints, in the background if configured.

The training state changes only in an optimizer step. A save therefore blocks the training loop only while ranks agree
to begin it: a thread copies the state to host memory during the next micro-batches, the next optimizer step waits for
the copy, and the thread then writes the files. The same thread makes all other copies and files, too.

Ranks report the results of their writes through the launch's `torch.distributed.Store`, because collectives of the
thread and of the training loop could run in a different order on each rank.
"""

import json
import logging
import math
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bipe.checkpoint.commit import FREE_SPACE, begin, delete, publish, retire
from megatron_bipe.checkpoint.manifest import CheckpointInfo
from megatron_bipe.checkpoint.shard_files import Fragment, rank_file, write_fragments, write_index
from megatron_bipe.checkpoint.staging_buffer import StagingBuffer, num_elements
from megatron_bipe.config import CheckpointConfig
from megatron_bipe.data.manifest import FileRecord
from megatron_bipe.errors import BipeError, CheckpointError
from megatron_bipe.parallel import Mesh
from megatron_bipe.runtime.host_collectives import HostCollectives
from megatron_bipe.runtime.observer import Observer

_log = logging.getLogger(__name__)
_WRITE_TIMEOUT_S = 7 * 86400.0  # limit for slow writes; the watchdog handles ranks that died or hang
_TELL_S = 5.0  # between two messages about the progress of a write
_PROGRESS = "progress"  # key of their number


class _Save(NamedTuple):
    """Arguments of one save on this rank."""

    run_dir: Path
    temporary: Path
    info: CheckpointInfo
    fragments: Sequence[Fragment]
    random: Mapping[str, Tensor]
    num_bytes: int  # total over all ranks
    began_s: float


class CheckpointWriter:
    """A writer of one engine's checkpoints; all ranks call each method together.

    Args:
        config: settings of writing and keeping checkpoints.
        mesh: this rank's coordinates.
        host: host-side collectives over all ranks.
        connect: opens a connection to the launch's store; only this object uses it.
    """

    def __init__(
        self, config: CheckpointConfig, mesh: Mesh, host: HostCollectives, connect: Callable[[], dist.Store]
    ) -> None:
        self._config, self._mesh, self._host, self._connect = config, mesh, host, connect
        self._store: dist.Store | None = None
        self._copy = StagingBuffer(mesh.device)
        self._copied = threading.Event()  # until it is set, the state must not change
        self._copied.set()
        # A thread begins with the first GPU, on which any call of CUDA would take memory.
        select = partial(torch.cuda.set_device, mesh.device) if mesh.device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=select)
        self._pending: Future[str] | None = None
        self._failures = 0  # saves in a row
        self.waited_s = 0.0  # total time that training was blocked by checkpoints
        self.observer = Observer()
        self._is_awaited = False  # True while the training loop waits for a write
        self._told_s = -math.inf  # when this rank last told the others of its progress

    def reserve(self, fragments: Sequence[Fragment]) -> None:
        """Allocate the memory for copies of these fragments in the background, if it is pinned: that takes long.

        Args:
            fragments: fragments like those that `save` will get; only their sizes matter.
        """
        if self._config.asynchronous and self._mesh.device.type == "cuda":
            self._thread.submit(self._copy.reserve, num_elements(fragments))

    def save(
        self,
        run_dir: Path,
        info: CheckpointInfo,
        fragments: Sequence[Fragment],
        random: Mapping[str, Tensor],
        *,
        final: bool,
    ) -> None:
        """Write a checkpoint and make it the newest.

        Args:
            run_dir: folder of the run.
            info: metadata of the run.
            fragments: fragments that this rank writes; views of the live state.
            random: states of this rank's random number generators.
            final: wait until the checkpoint is written, and raise on failure. Otherwise a failure is logged as a
                warning, and with `checkpoint.asynchronous` training continues during the write; but if this failure
                would reach `checkpoint.max_failures`, the save is made like a final one.

        Raises:
            CheckpointError: on all ranks, if `final` and the checkpoint could not be written, or for the
                `checkpoint.max_failures`-th time in a row.
        """
        waited_s = self.finish()
        must_succeed = final or 0 < self._config.max_failures <= self._failures + 1
        began_s = time.perf_counter()
        num_bytes = self._host.all_reduce_sum(sum(x.nbytes for f in fragments for x in f.state.values()))
        temporary, error = self._begin(run_dir, info.step, num_bytes)
        if temporary is not None:
            save = _Save(run_dir, temporary, info, fragments, random, num_bytes, began_s - waited_s)
            if self._config.asynchronous and not must_succeed:
                self._copied.clear()
                self._pending = self._thread.submit(self._write_in_background, save, self._copy.mark())
            else:
                with self._awaiting():
                    error = self._thread.submit(self._write, save, self._copy.mark(), wants_copy=False).result()
        if self._pending is None:
            self._count(error)
        self.waited_s += time.perf_counter() - began_s
        if error and self._mesh.is_main:
            self.observer.save_failed(info.step, error)
        if error and must_succeed:
            in_a_row = "" if final else f"{self._failures} checkpoints in a row failed, checkpoint.max_failures: "
            raise CheckpointError(f"{in_a_row}{error}", remedy=FREE_SPACE, location=run_dir / "checkpoints")
        if error:
            self._warn(info.step, run_dir, error)

    def before_update(self) -> None:
        """Wait until the training state may change; call this before each optimizer step."""
        if not self._copied.is_set():
            began_s = time.perf_counter()
            with self._awaiting():
                self._copied.wait()
            self.waited_s += time.perf_counter() - began_s

    @property
    def is_idle(self) -> bool:
        return self._pending is None or self._pending.done()

    def finish(self) -> float:
        """Wait for a pending save, and return the seconds waited."""
        began_s = time.perf_counter()
        if self._pending is not None:
            with self._awaiting():
                self._count(self._pending.result())
            self._pending = None
        waited_s = time.perf_counter() - began_s
        self.waited_s += waited_s
        return waited_s

    def close(self) -> None:
        """Wait for a pending save, and free the memory for copies."""
        self.finish()
        self._thread.submit(self._copy.release).result()
        self._thread.shutdown()

    def _count(self, error: str) -> None:
        self._failures = self._failures + 1 if error else 0

    def _begin(self, run_dir: Path, step: int, num_bytes: int) -> tuple[Path | None, str]:
        """Return the temporary folder or an error, the same on all ranks."""
        folder, error_text = "", ""
        if self._mesh.is_main:
            room_bytes = num_bytes + int(self._config.min_free_gib * 2**30)
            try:
                folder = str(begin(run_dir, step, uuid.uuid4().hex[:8], room_bytes))
            except (OSError, BipeError) as error:
                error_text = _text(error)
        folder, error_text = self._host.broadcast_object([folder, error_text])
        return (Path(folder) if folder else None), error_text

    def _write_in_background(self, save: _Save, mark: torch.cuda.Event | None) -> str:
        """Copy and write the state in the thread; a failure is logged immediately."""
        error = self._write(save, mark, wants_copy=True)
        if error:
            self._warn(save.info.step, save.run_dir, error)
            if self._mesh.is_main:
                self.observer.save_failed(save.info.step, error)
        return error

    def _write(self, save: _Save, mark: torch.cuda.Event | None, *, wants_copy: bool) -> str:
        """Write this rank's file; the main rank publishes the checkpoint. Return the error, the same on all ranks.

        Args:
            save: what to write.
            mark: result of `StagingBuffer.mark`.
            wants_copy: True if training continues meanwhile, as soon as the state is copied. Pinned memory is used in
                any case, since copying to it is fast. Without memory for a copy, training waits for the file.
        """
        key = save.temporary.name
        try:
            copies = self._copied_state(save, mark) if wants_copy or self._copy.is_pinned else None
            fragments = save.fragments if copies is None else copies
            advance = partial(self._advance, key)
            own = write_fragments(save.temporary, self._mesh.rank, fragments, save.random, advance).model_dump()
        except Exception as error:
            own = {"error": f"rank {self._mesh.rank} on {socket.gethostname()}: {_text(error)}"}
        finally:
            self._copied.set()
        if self._mesh.num_ranks == 1:
            return self._conclude(save, {0: own})
        store = self._open_store()
        store.set(f"{key}/{self._mesh.rank}", json.dumps(own))
        if self._mesh.is_main:
            reports = {rank: json.loads(self._get(key, str(rank))) for rank in range(self._mesh.num_ranks)}
            store.set(f"{key}/end", self._conclude(save, reports))
            for rank in reports:
                store.delete_key(f"{key}/{rank}")
        return self._get(key, "end").decode()

    def _copied_state(self, save: _Save, mark: torch.cuda.Event | None) -> Sequence[Fragment] | None:
        """Return a copy of the state and let training continue; None if there is no memory for it."""
        try:
            copies = self._copy.take(save.fragments, mark)
        except RuntimeError as error:
            raise RuntimeError(f"the training state could not be copied to host memory: {error}") from error
        if copies is not None:
            self._copied.set()
        return copies

    def _advance(self, key: str) -> None:
        """Record progress of a write, and tell ranks that wait for this one."""
        now_s = time.monotonic()
        if now_s - self._told_s > _TELL_S:
            self._told_s = now_s
            self._record_progress()
            if self._mesh.num_ranks > 1:
                self._open_store().add(f"{key}/{_PROGRESS}", 1)

    def _get(self, key: str, name: str) -> bytes:
        """Return a value that another rank sets when it has written its files; its progress counts as this rank's."""
        store, seen = self._open_store(), -1
        until_s = time.monotonic() + _WRITE_TIMEOUT_S
        while not store.check([f"{key}/{name}"]) and time.monotonic() < until_s:
            with suppress(dist.DistStoreError):  # a timeout
                store.wait([f"{key}/{name}"], timedelta(seconds=_TELL_S))
            found = store.add(f"{key}/{_PROGRESS}", 0)
            if found != seen:
                seen = found
                self._record_progress()
        value: bytes = store.get(f"{key}/{name}")
        return value

    def _record_progress(self) -> None:
        if self._is_awaited:
            self.observer.progress()

    @contextmanager
    def _awaiting(self) -> Iterator[None]:
        self._is_awaited = True
        try:
            yield
        finally:
            self._is_awaited = False

    def _conclude(self, save: _Save, reports: Mapping[int, Mapping[str, str]]) -> str:
        """Publish the files of all ranks, or delete them if a rank failed; return the error or ""."""
        errors = [report["error"] for report in reports.values() if "error" in report]
        if not errors:
            files = {rank_file(rank): FileRecord.model_validate(report) for rank, report in reports.items()}
            try:
                write_index(save.temporary, save.info, files)
                folder = publish(save.temporary, save.run_dir, save.info.step, files)
            except Exception as error:
                errors = [_text(error)]
        if errors:
            with suppress(OSError):
                delete(save.temporary)
            return "; ".join(errors)
        try:
            retire(save.run_dir, save.info.step, self._config, self.observer.steps_in_use())
        except OSError as error:
            _log.warning("old checkpoints could not be deleted: %s", _text(error))
        took_s = time.perf_counter() - save.began_s
        self.observer.saved(save.info.step, save.num_bytes, took_s)
        _log.info("step %d | saved %s | %.2f GB in %.1f s", save.info.step, folder, save.num_bytes / 1e9, took_s)
        return ""

    def _warn(self, step: int, run_dir: Path, error: str) -> None:
        if self._mesh.is_main:
            message = "step %d | no checkpoint: %s. Training continues; the previous checkpoint is kept. %s.  [%s]"
            _log.warning(message, step, error.rstrip("."), FREE_SPACE, run_dir / "checkpoints")

    def _open_store(self) -> dist.Store:
        if self._store is None:
            self._store = self._connect()
        return self._store


def _text(error: Exception) -> str:
    """Return the message of an error; of errors of torch, which explain themselves at length, the first line."""
    first_line = str(error).strip().partition("\n")[0]
    return error.message if isinstance(error, BipeError) else f"{type(error).__name__}: {first_line}"
