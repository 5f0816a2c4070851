"""The lock of an output: one run at a time, from the first look at the folder to the end."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bipe import io
from megatron_bipe.errors import DataError
from megatron_bipe.io import LOCK_NAME, locked
from tests.helpers.errors import raises


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "LOCK_WAIT_S", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out" / "work"


def enter(folder: Path, begin: Callable[[], None] | None = None) -> None:
    with locked(folder, begin):
        pass


def begin() -> None:
    """Stand for the first action of another run."""


def test_locked_processes_of_a_run_share_it_and_no_other_run_begins(folder: Path) -> None:
    with locked(folder, begin), locked(folder):
        enter(folder)
        with raises(DataError, location=folder.parent):
            enter(folder, begin)
    enter(folder, begin)


def test_locked_begins_alone(folder: Path) -> None:
    def look() -> None:
        for first in (None, begin):
            with raises(DataError, location=folder.parent):
                enter(folder, first)

    enter(folder, look)


def test_locked_empty_folder_is_removed_and_a_full_one_stays(folder: Path) -> None:
    enter(folder)
    assert not folder.exists()
    with locked(folder):
        (folder / "job").touch()
    assert {path.name for path in folder.iterdir()} == {"job", LOCK_NAME}


def test_locked_begin_that_fails_leaves_nothing_behind(folder: Path) -> None:
    def fail() -> None:
        raise DataError("no")

    with raises(DataError, "no"):
        enter(folder, fail)
    assert not folder.exists()


def test_locked_folder_that_others_removed_is_not_an_error(folder: Path) -> None:
    with locked(folder):
        (folder / LOCK_NAME).unlink()
        folder.rmdir()


@pytest.mark.parametrize("removed", ["before it is opened", "before it is held"])
def test_locked_folder_that_a_run_removed_on_leaving_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    opened, flock, calls = Path.open, fcntl.flock, []

    def remove() -> None:
        calls.append("")
        if len(calls) == 1:
            shutil.rmtree(folder)

    if removed == "before it is opened":
        monkeypatch.setattr(Path, "open", lambda path, mode: remove() or opened(path, mode))
    else:
        monkeypatch.setattr(fcntl, "flock", lambda stream, kind: remove() or flock(stream, kind))
    monkeypatch.setattr(io, "LOCK_WAIT_S", 60.0)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with locked(folder, begin):
        assert (folder / LOCK_NAME).exists()


def test_locked_run_that_slips_in_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, kinds = fcntl.flock, []

    def slow(stream: object, kind: int) -> None:
        kinds.append(kind)
        if len(kinds) == 2:  # between releasing the exclusive lock and acquiring the shared one
            raise BlockingIOError
        flock(stream, kind)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", slow)
    with raises(DataError, location=folder.parent):
        enter(folder, begin)
    assert kinds[:2] == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB]


def test_locked_opens_for_reading_and_writing_as_network_file_systems_need(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    monkeypatch.setattr(
        fcntl, "flock", lambda stream, _: modes.append(fcntl.fcntl(stream, fcntl.F_GETFL) & os.O_ACCMODE)
    )
    enter(folder, begin)
    assert set(modes) == {os.O_RDWR}


def test_locked_file_system_without_locks_goes_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(folder, begin):
        enter(folder, begin)


def test_locked_folder_with_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, observed in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "work", "Not a directory")):
        with raises(DataError, observed, location=folder.parent):
            enter(folder, begin)
