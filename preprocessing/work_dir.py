"""The work folder of an unfinished output: the job and its finished ranges. It survives any crash of the run.

DIR/unfinished/
  job.json             inputs and options of the job
  00000/range.json     written last, when range 0 is finished
  00000/000.bin ...    shards of range 0
"""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_bipe.data.manifest import JOB_NAME, WORK_FOLDER, Count, Record, ShardRecord
from megatron_bipe.errors import DataError
from megatron_bipe.io import LOCK_NAME, unreadable_error, write_atomically
from preprocessing.destinations import Destination
from preprocessing.document_tokenizer import BackendName
from preprocessing.readers.documents import PieceEnd
from preprocessing.readers.parse import Malformed

RANGE_NAME = "range.json"
CLEARED_NAME, PUBLISHED_NAME, STOCK_NAME = "cleared", "published", "stock"  # marker files, empty


class RangeShard(Record):
    """Shard of a range, and the dataset it is for."""

    destination: Destination
    """Split and partition."""
    shard: ShardRecord
    """Its record within the range's folder."""


class RangeRecord(Record):
    """Result of a range."""

    shards: tuple[RangeShard, ...]
    """Ordered by first document; shards of one destination are in the order of their documents."""
    ends: tuple[PieceEnd, ...]
    """One per piece of the range."""
    lines: Count
    """Lines that are not blank."""
    documents: Count
    """Documents that were written."""
    empty: Count
    """Texts without characters."""
    duplicates: Count
    """Texts skipped because they equal an earlier one."""
    malformed: Count
    """Lines that hold no document."""
    first_malformed: tuple[Malformed, ...]
    """The first malformed lines, numbered from the start of their piece."""
    backend: BackendName
    """Backend that tokenized the range."""
    malformed_pieces: tuple[Count, ...]
    """Index of the piece of each line in `first_malformed`."""


class WorkFolder:
    """Folder of the unfinished work for an output folder."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output / WORK_FOLDER

    def range_folder(self, number: int) -> Path:
        return self.path / f"{number:05d}"

    def is_done(self, number: int) -> bool:
        return (self.range_folder(number) / RANGE_NAME).exists()

    def has_documents(self, number: int) -> bool:
        """Return True if a range is finished and has documents."""
        return self.is_done(number) and self.load_range(number).documents > 0

    def save_range(self, number: int, record: RangeRecord) -> None:
        """Save a range's record, which marks the range as finished."""
        self.range_folder(number).mkdir(parents=True, exist_ok=True)  # a range without documents has none yet
        write_atomically(self.range_folder(number) / RANGE_NAME, record.model_dump_json().encode())

    def load_range(self, number: int) -> RangeRecord:
        path = self.range_folder(number) / RANGE_NAME
        try:
            return RangeRecord.model_validate_json(path.read_bytes())
        except OSError as error:
            raise unreadable_error(path, error) from error
        except ValidationError as error:
            raise DataError(
                f"The record of a finished range is damaged: {error.errors()[0]['msg']}",
                remedy="Remove its folder, and run the same command again",
                location=path,
            ) from error

    def begin(self, job: dict[str, Any], *, has_output: bool, overwrite: bool) -> None:
        """Resume the same job, or start it; `job` is everything that determines the output's bytes.

        Raises:
            DataError: there is a finished dataset or another job's work, and no `overwrite`.
        """
        old = self._old_job()
        if old is None:
            self.remove()  # what an interrupted removal left
        elif old != job:
            if not overwrite:
                raise DataError(
                    f"The output folder holds unfinished work of another job; it differs in {_differences(old, job)}",
                    remedy="Run that job's command to finish it, name another folder, or add --overwrite to drop it",
                    location=self.path,
                )
            self.remove()
        if old == job:
            return
        self.require_replaceable(has_output, overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        if not has_output:
            self.mark(CLEARED_NAME)
        write_atomically(self.path / JOB_NAME, json.dumps(job, indent=1).encode())

    def require_replaceable(self, has_output: bool, overwrite: bool) -> None:
        if has_output and not overwrite:
            raise DataError(
                "The output folder holds a dataset",
                remedy="Name another folder, or add --overwrite to replace it",
                location=self.output,
            )

    def _old_job(self) -> Any:
        path = self.path / JOB_NAME
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DataError(
                f"This record of an unfinished run cannot be read: {error}",
                remedy="Remove its folder",
                location=path,
            ) from error

    def has(self, mark: str) -> bool:
        """Return True if a marker exists.

        `CLEARED_NAME`: no earlier output is left, so all files are this job's. `PUBLISHED_NAME`: the output is
        complete, and only this folder remains to be removed. `STOCK_NAME`: the fast tokenizer gave wrong ids.
        """
        return (self.path / mark).exists()

    def mark(self, mark: str) -> None:
        write_atomically(self.path / mark, b"")

    def remove(self) -> None:
        """Empty the folder, markers after the job, so that an interrupted removal does not look like a job.

        The lock file stays; releasing the lock removes the empty folder.
        """
        found = list(self.path.iterdir()) if self.path.exists() else []
        for path in sorted(found, key=lambda path: (path.is_file(), path.name != JOB_NAME)):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_NAME:
                path.unlink(missing_ok=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a failure of the disk into a `DataError`."""
        try:
            yield
        except OSError as error:
            fix = "Free disk space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Fix the cause"
            raise DataError(
                f"The output cannot be written: {error.strerror or error}",
                remedy=f"{fix}, and run the same command again: finished shards are kept",
                location=error.filename or self.path,
            ) from error


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return the names of the fields that differ, inputs by file."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) and name != "inputs"]
    files = {str(entry[0]): entry for entry in old.get("inputs", [])}
    changed = [str(entry[0]) for entry in new["inputs"] if files.get(str(entry[0])) != entry]
    gone = set(files) - {str(entry[0]) for entry in new["inputs"]}
    if changed or gone:
        shown = sorted({*changed, *gone})
        names.append(f"inputs (in name, size or date: {', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''})")
    elif old.get("inputs") != new["inputs"]:
        names.append("the order of the inputs")
    return ", ".join(names)
