"""The unfinished part of an output: what the job is, and what of it is done. Survives any death of the run.

DIR/unfinished/
  job.json             what is being made from what
  00000/range.json     written when range 0 is done, last in its folder
  00000/000.bin ...    its shards
"""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_bipe.data.manifest import Count, Record, ShardRecord
from megatron_bipe.errors import DataError
from megatron_bipe.io import LOCK_NAME, unreadable, write_atomically
from preprocessing.encode import Destination
from preprocessing.readers.documents import PieceEnd
from preprocessing.readers.parse import Malformed
from preprocessing.tokenizer_backend import Name

WORK_FOLDER = "unfinished"
JOB_NAME, RANGE_NAME = "job.json", "range.json"
CLEARED_NAME, PUBLISHED_NAME, STOCK_NAME = "cleared", "published", "stock"  # marks: empty files


class RangeShard(Record):
    """A shard of a range, and the dataset it is for."""

    destination: Destination
    """Split and partition."""
    shard: ShardRecord
    """As it lies in the range's folder."""


class RangeRecord(Record):
    """What came of a range."""

    shards: tuple[RangeShard, ...]
    """In the order of their first documents, those of one destination in the order of their documents."""
    ends: tuple[PieceEnd, ...]
    """Of the range's pieces."""
    lines: Count
    """That are not blank."""
    documents: Count
    """Written."""
    empty: Count
    """Texts of no characters."""
    duplicates: Count
    """Texts left out because an earlier one is equal."""
    malformed: Count
    """Lines that hold no document."""
    first_malformed: tuple[Malformed, ...]
    """The first of them, their lines counted from the start of the piece."""
    backend: Name
    """That tokenized it."""
    malformed_pieces: tuple[Count, ...]
    """For each of the first, the number of the piece it lies in."""


class WorkFolder:
    """Where an output grows.

    Args:
        output: the folder that is to hold the result.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output / WORK_FOLDER

    def range_folder(self, number: int) -> Path:
        """Where one range's files go."""
        return self.path / f"{number:05d}"

    def is_done(self, number: int) -> bool:
        """Whether a range is finished."""
        return (self.range_folder(number) / RANGE_NAME).exists()

    def has_documents(self, number: int) -> bool:
        """Whether a range is finished and was not in vain."""
        return self.is_done(number) and self.load_range(number).documents > 0

    def save_range(self, number: int, record: RangeRecord) -> None:
        """Mark a range as finished."""
        self.range_folder(number).mkdir(parents=True, exist_ok=True)  # without documents there is none yet
        write_atomically(self.range_folder(number) / RANGE_NAME, record.model_dump_json().encode())

    def load_range(self, number: int) -> RangeRecord:
        """What came of a finished range."""
        path = self.range_folder(number) / RANGE_NAME
        try:
            return RangeRecord.model_validate_json(path.read_bytes())
        except OSError as error:
            raise unreadable(path, error) from error
        except ValidationError as error:
            raise DataError(
                f"The record of a finished range is damaged: {error.errors()[0]['msg']}",
                remedy="Remove the folder it lies in, and run the same command again",
                location=path,
            ) from error

    def begin(self, job: dict[str, Any], *, has_output: bool, overwrite: bool) -> None:
        """Go on with the same job, or start it.

        Args:
            job: everything that decides the output's bytes.
            has_output: whether the output folder holds a finished dataset.
            overwrite: whether to replace that, or another job's beginnings.

        Raises:
            DataError: something is there that may not be replaced.
        """
        old = self._old_job()
        if old is None:
            self.remove()  # the rest of one that was being removed
        elif old != job:
            if not overwrite:
                raise DataError(
                    f"The output folder holds the beginnings of another job; it differs in {_differences(old, job)}",
                    remedy="Give that job's command to finish it, name another folder, or add --overwrite to drop it",
                    location=self.path,
                )
            self.remove()
        if old == job:
            return
        if has_output and not overwrite:
            raise DataError(
                "The output folder holds a dataset",
                remedy="Name another folder, or add --overwrite to replace it",
                location=self.output,
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if not has_output:
            self.mark(CLEARED_NAME)
        write_atomically(self.path / JOB_NAME, json.dumps(job, indent=1).encode())

    def _old_job(self) -> Any:
        path = self.path / JOB_NAME
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DataError(
                f"This record of an unfinished run cannot be read: {error}",
                remedy="Remove the folder it lies in",
                location=path,
            ) from error

    def has(self, mark: str) -> bool:
        """Whether a mark was made.

        `CLEARED_NAME`: nothing of an earlier output is left, so that what is there is this job's. `PUBLISHED_NAME`: the
        output is complete, and this folder alone remains to be removed. `STOCK_NAME`: the fast tokenizer was wrong.
        """
        return (self.path / mark).exists()

    def mark(self, mark: str) -> None:
        """Make a mark."""
        write_atomically(self.path / mark, b"")

    def remove(self) -> None:
        """Empty the folder, the marks after the job, so that a removal that is cut short can be told from a job.

        The lock stays until it is let go, which removes an empty folder.
        """
        found = list(self.path.iterdir()) if self.path.exists() else []
        for path in sorted(found, key=lambda path: (path.is_file(), path.name != JOB_NAME)):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_NAME:
                path.unlink(missing_ok=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Says what becomes of a run whose disk fails it."""
        try:
            yield
        except OSError as error:
            mend = "Make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Mend it"
            raise DataError(
                f"The output cannot be written: {error.strerror or error}",
                remedy=f"{mend}, and run the same command again: finished shards are kept",
                location=error.filename or self.path,
            ) from error


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Names of the fields that differ, inputs by file."""
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
