"""Checks beside training that the files it reads are those of the manifest, and stay so.

Opening a dataset looks at sizes and headers; its bytes would take hours. Here a thread takes the checksum of each file
once it has been read from, and then looks now and then whether it is still the same file.
"""

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from megatron_bipe.data.shard import Shard
from megatron_bipe.data.shard_layout import Suffix, damaged
from megatron_bipe.errors import DataError
from megatron_bipe.io import unreadable

FIRST_LOOK_S, LOOK_S = 1.0, 60.0  # until the first look at the files, and between looks
READ: tuple[Suffix, ...] = ("bin", "seg")  # by training

_CHUNK_BYTES = 1 << 20
_WORK_SHARE = 0.1  # of one core's time: the rest of it, and of the disk, is for training


class _Seen(NamedTuple):
    """What tells a file from one that has changed or taken its place."""

    inode: int
    num_bytes: int
    changed_ns: int


class BackgroundVerifier:
    """The thread; it works while this is entered.

    Args:
        shards: with their records of the manifest.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._good: dict[Path, _Seen] = {}
        self._over = threading.Event()
        self._wrong: DataError | None = None
        self._thread = threading.Thread(target=self._watch, name="shards", daemon=True)

    def raise_found(self) -> None:
        """To be called whenever shards have been read.

        Raises:
            DataError: a file that has been read from is missing, changed, or not the one of the manifest.
        """
        if self._wrong is not None:
            raise self._wrong

    def __enter__(self) -> Self:
        if self._shards:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._shards:
            self._thread.join()

    def _watch(self) -> None:
        wait_s = FIRST_LOOK_S
        while not self._over.wait(wait_s):
            try:
                for shard, suffix in self._in_use():
                    self._check(shard, suffix)
            except DataError as error:
                self._wrong = error
                return
            wait_s = LOOK_S

    def _in_use(self) -> Iterator[tuple[Shard, Suffix]]:
        for shard in self._shards:
            yield from ((shard, suffix) for suffix in READ if shard.is_open(suffix) and not self._over.is_set())

    def _check(self, shard: Shard, suffix: Suffix) -> None:
        """Take the checksum of a file that is new or has changed."""
        assert shard.record is not None  # it is a dataset's
        path, expected = shard.path(suffix), shard.record.files[suffix]
        seen = _look(path)
        if self._good.get(path) == seen:
            return
        if seen.num_bytes != expected.bytes:
            raise damaged(path, f"the file ends at byte {seen.num_bytes}; the manifest says {expected.bytes} bytes")
        found = self._sha256(path)
        if found is None:
            return
        if found != expected.sha256:
            raise damaged(path, f"its SHA-256 is {found}; the manifest says {expected.sha256}")
        self._good[path] = seen

    def _sha256(self, path: Path) -> str | None:
        """Checksum of a file, with pauses; None: it is not wanted any more."""
        digest = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as stream:
                while True:
                    began_s = time.perf_counter()
                    chunk = stream.read(_CHUNK_BYTES)
                    digest.update(chunk)
                    if not chunk:
                        return digest.hexdigest()
                    if self._over.wait((time.perf_counter() - began_s) * (1 / _WORK_SHARE - 1)):
                        return None
        except OSError as error:
            raise unreadable(path, error) from error


def _look(path: Path) -> _Seen:
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return _Seen(status.st_ino, status.st_size, status.st_mtime_ns)
