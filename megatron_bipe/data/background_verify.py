"""Verification in the background that the files that training reads match the manifest and do not change.

Opening a dataset checks only sizes and headers, since hashing all bytes would take hours. A thread hashes each file
after training has first read from it, then checks at intervals whether the file has changed or been replaced.
"""

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from megatron_bipe.data.shard import Shard
from megatron_bipe.data.shard_layout import Suffix, damaged_error
from megatron_bipe.errors import DataError
from megatron_bipe.io import read_again, unreadable_error

FIRST_LOOK_S, LOOK_S = 1.0, 60.0  # delay before the first check, and interval between checks
READ: tuple[Suffix, ...] = ("bin", "seg")  # the files that training reads

_CHUNK_BYTES = 1 << 20
_WORK_SHARE = 0.1  # fraction of one core's time; the rest, and the rest of the disk bandwidth, is left to training


class _FileStamp(NamedTuple):
    """Metadata that changes when a file is modified or replaced."""

    inode: int
    num_bytes: int
    changed_ns: int


class BackgroundVerifier:
    """Context manager that runs the verification thread on shards with records from a manifest."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._verified: dict[Path, _FileStamp] = {}
        self._stopping = threading.Event()
        self._error: DataError | None = None
        self._thread = threading.Thread(target=self._watch, name="shards", daemon=True)

    def raise_if_failed(self) -> None:
        """Raise DataError if the thread has found a wrong file. Call this after shards have been read."""
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        if self._shards:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        if self._shards:
            self._thread.join()

    def _watch(self) -> None:
        wait_s = FIRST_LOOK_S
        while not self._stopping.wait(wait_s):
            try:
                for shard, suffix in self._in_use():
                    self._check(shard, suffix)
            except DataError as error:
                self._error = error
                return
            wait_s = LOOK_S

    def _in_use(self) -> Iterator[tuple[Shard, Suffix]]:
        for shard in self._shards:
            yield from ((shard, suffix) for suffix in READ if shard.is_open(suffix) and not self._stopping.is_set())

    def _check(self, shard: Shard, suffix: Suffix) -> None:
        """Hash a file unless it is unchanged since it was last hashed."""
        assert shard.record is not None  # shards of a dataset have one
        path, expected = shard.path(suffix), shard.record.files[suffix]
        stamp = _stat(path)
        if self._verified.get(path) == stamp:
            return
        if stamp.num_bytes != expected.bytes:
            raise damaged_error(
                path, f"the file ends at byte {stamp.num_bytes}; the manifest says {expected.bytes} bytes"
            )
        found = self._sha256(path)
        if found is None:
            return
        if found != expected.sha256:
            raise damaged_error(path, f"its SHA-256 is {found}; the manifest says {expected.sha256}")
        self._verified[path] = stamp

    def _sha256(self, path: Path) -> str | None:
        """Hash a file at a limited rate. Return None if the verifier is stopped meanwhile."""
        try:
            return read_again(lambda: self._hash_once(path))
        except OSError as error:
            raise unreadable_error(path, error) from error

    def _hash_once(self, path: Path) -> str | None:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as stream:
            while True:
                began_s = time.perf_counter()
                chunk = stream.read(_CHUNK_BYTES)
                digest.update(chunk)
                if not chunk:
                    return digest.hexdigest()
                if self._stopping.wait((time.perf_counter() - began_s) * (1 / _WORK_SHARE - 1)):
                    return None


def _stat(path: Path) -> _FileStamp:
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable_error(path, error) from error
    return _FileStamp(status.st_ino, status.st_size, status.st_mtime_ns)
