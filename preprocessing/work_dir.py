"""The work folder of an unfinished output: the job and its finished ranges. It survives any crash of the run.

DIR/unfinished/
  job.json             inputs and options of the job
  files.json           files of the output that may be deleted or replaced: an earlier dataset's, then the job's own
  00000/range.json     written last, when range 0 is finished
  00000/000.bin ...    shards of range 0
"""

import errno
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from megatron_bipe.data.manifest import JOB_NAME, WORK_FOLDER, Count, Record, ShardRecord
from megatron_bipe.errors import DataError, failed_path
from megatron_bipe.io import LOCK_NAME, PARTIAL_SUFFIX, unreadable_error, write_atomically
from preprocessing.destinations import DROPPED_NAME as DROPPED_ROWS_NAME
from preprocessing.destinations import HASHES_NAME, Destination
from preprocessing.document_tokenizer import BackendName
from preprocessing.readers.documents import PieceEnd
from preprocessing.readers.parse import Malformed

FILES_NAME, RANGE_NAME = "files.json", "range.json"
DROPPED_NAME = "dropped.json"  # the record of a job whose folder is being removed
CLEARED_NAME, PUBLISHED_NAME, STOCK_NAME = "cleared", "published", "stock"  # marker files, empty
_RECORDS = (JOB_NAME, FILES_NAME, DROPPED_NAME)
_MARKS = tuple(mark + end for mark in (CLEARED_NAME, PUBLISHED_NAME, STOCK_NAME) for end in ("", PARTIAL_SUFFIX))
_RANGE = re.compile(r"\d{5,}")
_RANGE_FILE = re.compile(
    rf"({RANGE_NAME}|{HASHES_NAME}|{DROPPED_ROWS_NAME}|\d{{3,}}\.(bin|idx|seg))({PARTIAL_SUFFIX})?"
)


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

    def begin(self, job: dict[str, Any], files: Iterable[str], *, overwrite: bool) -> None:
        """Resume the same job, or start it.

        Args:
            job: everything that determines the output's bytes.
            files: recorded files of the output, relative to it; publication deletes them.
            overwrite: replace them, and drop the unfinished work of another job.

        Raises:
            DataError: there is a finished dataset or another job's work, and no `overwrite`.
        """
        old = _read_record(self.path / JOB_NAME)
        if old == job or (self.has(PUBLISHED_NAME) and _read_record(self.path / DROPPED_NAME) == job):
            return
        if old is not None and not overwrite:
            raise DataError(
                f"The output folder holds unfinished work of another job; it differs in {_differences(old, job)}",
                remedy="Run that job's command to finish it, name another folder, or add --overwrite to drop it",
                location=self.path,
            )
        found = sorted(name for name in files if (self.output / name).exists())
        self.require_replaceable(bool(found), overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        self.save_files(found)  # before the other job's record of them is lost
        self._drop_job()
        write_atomically(self.path / JOB_NAME, json.dumps(job, indent=1).encode())
        (self.path / DROPPED_NAME).unlink(missing_ok=True)
        if not found:
            self.mark(CLEARED_NAME)

    def save_files(self, files: Iterable[str]) -> None:
        """Record files of the output, relative to it: those to delete or, once it is cleared, those to write."""
        write_atomically(self.path / FILES_NAME, json.dumps(sorted(files), indent=1).encode())

    def load_files(self) -> set[str]:
        """Return the recorded files of the output, relative to it."""
        path = self.path / FILES_NAME
        files = _read_record(path)
        if not isinstance(files, list | None) or not all(map(_is_inside, files or ())):
            raise _damaged_record(path, "it is not a list of paths inside the output")
        return set(files or ())

    def foreign_paths(self) -> Iterator[Path]:
        """Yield the paths in the folder that no job wrote: all, if there is no record of a job."""
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            yield self.path
            return
        has_record = any((self.path / name).is_file() for name in _RECORDS)
        begun = (LOCK_NAME, *(name + PARTIAL_SUFFIX for name in _RECORDS))  # files that precede the first record
        for path in self._entries():
            if not has_record and path.name not in begun:
                yield path
            elif _is_range(path):
                yield from (file for file in sorted(path.iterdir()) if not _is_range_file(file))
            elif path.is_symlink() or path.name not in (*begun, *_RECORDS, *_MARKS):
                yield path

    def require_replaceable(self, has_output: bool, overwrite: bool) -> None:
        if has_output and not overwrite:
            raise DataError(
                "The output folder holds a dataset",
                remedy="Name another folder, or add --overwrite to replace it",
                location=self.output,
            )

    def has(self, mark: str) -> bool:
        """Return True if a marker exists.

        `CLEARED_NAME`: no earlier output is left, so all files are this job's. `PUBLISHED_NAME`: the output is
        complete, and only this folder remains to be removed. `STOCK_NAME`: the fast tokenizer gave wrong ids.
        """
        return (self.path / mark).exists()

    def mark(self, mark: str) -> None:
        write_atomically(self.path / mark, b"")

    def remove(self) -> None:
        """Delete what a job wrote to the folder, in an order in which an interrupted removal is not taken for a job.

        The lock file stays; releasing the lock removes the empty folder.
        """
        self._drop_job()
        for name in (FILES_NAME, DROPPED_NAME):
            (self.path / name).unlink(missing_ok=True)

    def _drop_job(self) -> None:
        """Delete the ranges, then the job and its marks; the files that it recorded stay on record."""
        for folder in filter(_is_range, self._entries()):
            (folder / RANGE_NAME).unlink(missing_ok=True)  # first: a range without shards must not look finished
            for file in filter(_is_range_file, list(folder.iterdir())):
                file.unlink()
            with suppress(OSError):  # a path that is not of the job
                folder.rmdir()
        if (self.path / JOB_NAME).exists():
            (self.path / JOB_NAME).replace(self.path / DROPPED_NAME)  # needs no space, unlike a new file
        for name in (*_MARKS, *(name + PARTIAL_SUFFIX for name in _RECORDS)):
            (self.path / name).unlink(missing_ok=True)

    def _entries(self) -> list[Path]:
        return sorted(self.path.iterdir()) if self.path.exists() else []

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
                location=failed_path(error) or self.path,
            ) from error


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return the names of the fields that differ, inputs by file."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) and name != "inputs"]
    files = {str(entry[0]): entry for entry in old.get("inputs", [])}
    inputs = new.get("inputs", [])
    changed = [str(entry[0]) for entry in inputs if files.get(str(entry[0])) != entry]
    gone = set(files) - {str(entry[0]) for entry in inputs}
    if changed or gone:
        shown = sorted({*changed, *gone})
        names.append(f"inputs (in name, size or date: {', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''})")
    elif old.get("inputs", []) != inputs:
        names.append("the order of the inputs")
    return ", ".join(names)


def _is_range(path: Path) -> bool:
    return _RANGE.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def _is_range_file(path: Path) -> bool:
    return _RANGE_FILE.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()


def _is_inside(name: object) -> bool:
    return isinstance(name, str) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _read_record(path: Path) -> Any:
    """Return the content of a JSON file, or None if it is missing."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged_record(path, str(error)) from error


def _damaged_record(path: Path, why: str) -> DataError:
    return DataError(
        f"This record of an unfinished run cannot be read: {why}", remedy="Remove its folder", location=path
    )
