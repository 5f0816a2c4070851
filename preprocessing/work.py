"""The unfinished part of an output: what the job is, and what of it is done. Survives any death of the run.

DIR/unfinished/
  job.json             what is being made from what
  00000/range.json     written when range 0 is done, last in its folder
  00000/000.bin ...    its shards
"""

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from megatron_bipe.data.files import unreadable, write_atomically
from megatron_bipe.data.records import Count, Record, ShardRecord
from megatron_bipe.errors import DataError
from preprocessing.backend import Name
from preprocessing.readers.documents import PieceEnd
from preprocessing.readers.parse import Malformed
from preprocessing.tokenize import Destination

WORK_FOLDER = "unfinished"
LOCK_WAIT_S = 10.0  # for processes of a killed run to be gone
JOB_NAME, RANGE_NAME, LOCK_NAME = "job.json", "range.json", "lock"
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
                f"The record of a finished range is damaged: {error}",
                remedy="Remove the folder it lies in, and run the same command again",
                place=path,
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
                    place=self.path,
                )
            self.remove()
        if old == job:
            return
        if has_output and not overwrite:
            raise DataError(
                "The output folder holds a dataset",
                remedy="Name another folder, or add --overwrite to replace it",
                place=self.output,
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
                place=path,
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
        """Empty the folder, the marks last, so that a removal that is cut short can be told from a job.

        The lock stays until it is let go, which removes an empty folder.
        """
        found = sorted(self.path.iterdir(), key=lambda path: path.is_file()) if self.path.exists() else []
        for path in found:
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_NAME:
                path.unlink(missing_ok=True)

    @contextmanager
    def locked(self, *, alone: bool) -> Iterator[Self]:
        """Hold the folder: alone to look after it, together with others to work in it. Ends with the process.

        File systems that have no locks go without.

        Raises:
            DataError: another run is at work here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK_NAME).open("a") as stream:
            until_s = time.monotonic() + LOCK_WAIT_S
            while True:
                try:
                    fcntl.flock(stream, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until_s:
                        raise DataError(
                            "Another run is writing to this folder",
                            remedy="Wait for it or stop it, or name another folder",
                            place=self.output,
                        ) from None
                    time.sleep(0.1)
                except OSError:
                    break
            try:
                yield self
            finally:
                if self.path.exists() and [path.name for path in self.path.iterdir()] == [LOCK_NAME]:
                    shutil.rmtree(self.path, ignore_errors=True)


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
