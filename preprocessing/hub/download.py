"""Download a dataset repository of the Hugging Face Hub to a folder, with resume and verification.

A file is written as NAME.partial, verified against the checksum that the Hub reports, and only then renamed. The
folder's receipt records the verified files, so that a later run does not read them again unless asked to.
"""

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from httpx2 import HTTPError
from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm

from megatron_bipe.errors import DataError
from megatron_bipe.io import fsync_path, partial_path
from preprocessing.hub.plan import (
    LOCK_NAME,
    DownloadOptions,
    Item,
    Plan,
    Receipt,
    State,
    find_snapshot,
    format_paths,
    receipt_for,
    rest_bytes,
    survey,
)
from preprocessing.hub.transfer import (
    RESUME_HINT,
    HubFile,
    Snapshot,
    disk_errors,
    hub_errors,
    is_complete,
    receive,
    require_transferable,
)
from preprocessing.line_counts import require_at_least
from preprocessing.progress import LINE_EVERY_S

LOCK_WAIT_S = 1.0
ATTEMPTS = 3  # to get a file with the right checksum
WAITS_S = (10.0, 20.0, 40.0, 80.0)  # between attempts while no byte arrives: the network is down, or the Hub is busy

T = TypeVar("T")
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """Result of a download, after which all files of the snapshot are complete."""

    snapshot: Snapshot
    num_fetched: int


def download(options: DownloadOptions) -> Outcome:
    """Fetch the selected files that the folder lacks, and verify all of them.

    Raises:
        DataError: as in `make_plan`; also for another run in the same folder, files of other origin, too little space,
            or files that do not arrive intact. The next run resumes from the bytes that have arrived.
    """
    require_at_least("--workers", options.workers, 1)
    snapshot = find_snapshot(options)
    log.info("%s at commit %s; licence: %s", snapshot.repo, snapshot.commit, snapshot.licence)
    with _alone_in(options.output):
        receipt = receipt_for(options.output, snapshot)
        receipt.save(options.output)  # before the first partial file, which belongs to this commit
        plan = _check(options, survey(options, snapshot, receipt), receipt)
        wanted = [item for item in plan.items if item.state != State.COMPLETE]
        _require_ours(wanted, receipt, options)
        require_transferable([item.file for item in wanted])
        plan.require_space()
        _fetch_all(options, snapshot, wanted, receipt)
    return Outcome(snapshot, len(wanted))


def _check(options: DownloadOptions, plan: Plan, receipt: Receipt) -> Plan:
    """Read the unchecked files; mark each as complete, also in the receipt, or as damaged."""
    unchecked = [item for item in plan.items if item.state == State.UNCHECKED]
    verdicts: dict[str, Item] = {}

    def look(item: Item) -> bool:
        is_intact = is_complete(options.output / item.file.path, item.file)
        meter.add(item.file.size_bytes)
        return is_intact

    def note(item: Item, is_intact: bool) -> None:
        path = options.output / item.file.path
        if is_intact:
            receipt.add(item.file, path)
            verdicts[item.file.path] = item._replace(state=State.COMPLETE)
        else:
            receipt.mark_unverified(item.file)
            verdicts[item.file.path] = Item(item.file, State.DAMAGED, rest_bytes(path, item.file))
        receipt.save(options.output)

    with Meter("Checking", sum(item.file.size_bytes for item in unchecked)) as meter:
        run_in_threads(look, unchecked, options.workers, note, meter)
    return plan._replace(items=tuple(verdicts.get(item.file.path, item) for item in plan.items))


def _require_ours(wanted: list[Item], receipt: Receipt, options: DownloadOptions) -> None:
    """Refuse to replace files that no earlier run wrote."""
    damaged = [item.file.path for item in wanted if item.state == State.DAMAGED]
    foreign = [path for path in damaged if path not in receipt.files]
    if foreign and not options.overwrite:
        raise DataError(
            f"{len(foreign)} file(s) here differ from the Hub's and are not from this tool: {format_paths(foreign)}",
            remedy="Name another folder, or add --overwrite to replace them",
            location=options.output,
        )
    for path in damaged:
        log.warning("%s differs from the Hub's file and is fetched again", options.output / path)


def _fetch_all(options: DownloadOptions, snapshot: Snapshot, wanted: list[Item], receipt: Receipt) -> None:
    failed: list[str] = []

    def note(item: Item, is_intact: bool) -> None:
        if not is_intact:
            failed.append(item.file.path)
            return
        receipt.add(item.file, options.output / item.file.path)
        receipt.save(options.output)

    with Meter("Downloading", sum(item.fetch_bytes for item in wanted)) as meter:
        run_in_threads(lambda item: _fetch(item, options, snapshot, meter), wanted, options.workers, note, meter)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(wanted)} files did not arrive in {ATTEMPTS} attempts: {format_paths(failed)}",
            remedy=f"Check whether a proxy alters them, and {RESUME_HINT}",
            location=options.output,
        )


def _fetch(item: Item, options: DownloadOptions, snapshot: Snapshot, meter: "Meter") -> bool:
    """Fetch a file, and rename it once its content is verified; return False if it never is."""
    path = options.output / item.file.path
    part = partial_path(path)
    bar = _FileBar(meter, item.file.size_bytes - item.fetch_bytes)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(ATTEMPTS):
        _receive_patiently(snapshot, item.file, options.endpoint, part, bar)
        if is_complete(part, item.file):
            with disk_errors(path):
                fsync_path(part)
                part.replace(path)
                fsync_path(path.parent)
            return True
        if part.stat().st_size >= item.file.size_bytes:
            log.warning("%s arrived with a wrong checksum", item.file.path)
            part.unlink()
    return False


def _receive_patiently(snapshot: Snapshot, file: HubFile, endpoint: str | None, part: Path, bar: "_FileBar") -> None:
    waits, there_bytes = iter(WAITS_S), -1
    with hub_errors(snapshot.repo):
        while True:
            try:
                return receive(snapshot, file, endpoint, part, bar)
            except HTTPError as error:
                if part.stat().st_size > there_bytes:
                    waits, there_bytes = iter(WAITS_S), part.stat().st_size
                wait_s = next(waits, None)
                if wait_s is None:
                    raise
                log.warning("%s: %s; trying again in %.0f s", file.path, " ".join(str(error).split()), wait_s)
                bar.meter.wait(wait_s)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Create the folder and lock it: two runs that append to one partial file would damage it."""
    with disk_errors(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(WeakFileLock(folder / LOCK_NAME, timeout=LOCK_WAIT_S))
        except TimeoutError as error:
            raise DataError(
                "Another run is downloading into this folder",
                remedy="Wait for it, or name another",
                location=folder,
                transient=True,
            ) from error
        yield


class Stopped(Exception):  # noqa: N818 - not an error: it ends a worker after another one, or the user, has ended the run
    """Signal to a worker that the run has ended."""


class _LogWriter:
    """Output of a bar where there is no terminal: each update becomes a log line."""

    def write(self, text: str) -> None:
        if text := text.strip():
            log.info(text)

    def flush(self) -> None:
        pass


class Meter:
    """Progress of all workers in bytes, as a bar on a terminal or a log line every half minute; also stops them."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self.bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=what, disable=not total_bytes, **_style())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, num_bytes: int) -> None:
        """Count bytes, a negative number for discarded ones; raise `Stopped` after `stop`."""
        if self._stopped.is_set():
            raise Stopped
        with self._lock:
            self.bar.update(num_bytes)

    def wait(self, seconds: float) -> None:
        """Wait; raise `Stopped` as soon as the run ends."""
        if self._stopped.wait(seconds):
            raise Stopped

    def stop(self) -> None:
        self._stopped.set()


def _style() -> dict[str, Any]:
    if sys.stderr.isatty():
        return {}
    text = "{desc}: {percentage:.1f}%, {n_fmt}B of {total_fmt}B at {rate_fmt}, {remaining} left"
    return {"file": _LogWriter(), "bar_format": text, "delay": LINE_EVERY_S, "mininterval": LINE_EVERY_S, "miniters": 1}


class _FileBar:
    """Substitute for the class `tqdm` in `http_get`: adds the bytes of one file to the meter of all."""

    def __init__(self, meter: Meter, counted_bytes: int) -> None:
        self.meter = meter
        self._counted_bytes = counted_bytes

    def __call__(self, *, initial: int, **_: Any) -> Self:
        """Start a transfer at `initial` bytes, which are fewer than counted if a partial file was discarded."""
        self.update(initial - self._counted_bytes)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, num_bytes: int) -> None:
        self._counted_bytes += num_bytes
        self.meter.add(num_bytes)


def run_in_threads(
    work: Callable[[T], Result],
    items: Iterable[T],
    workers: int,
    note: Callable[[T, Result], None],
    meter: Meter,
) -> None:
    """Run `work` in threads, and `note` with each result in the calling thread; the first error stops all."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = {pool.submit(work, item): item for item in items}
            for future in as_completed(futures):
                note(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            meter.stop()
            raise
