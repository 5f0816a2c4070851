"""Files and folders that appear in one step or not at all; the lock of an output, which one run holds at a time."""

import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_bipe import io
from megatron_bipe.errors import DataError, as_user_error, exit_code
from megatron_bipe.io import LOCK_NAME, atomic_directory, lock_holder, locked, unfinished_path
from tests.helpers.errors import assert_error, raises


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


def test_locked_busy_names_who_holds_it_and_may_be_tried_again(folder: Path) -> None:
    assert lock_holder(folder) == ""
    with locked(folder, begin, job="SLURM job 7"):
        assert f"process {os.getpid()} on {socket.gethostname()} (SLURM job 7), since 2" in lock_holder(folder)
        with (
            raises(DataError, os.getpid(), "SLURM job 7", "step 41", location=folder.parent) as caught,
            locked(folder, begin, progress=lambda: "step 41"),
        ):
            pass
        assert exit_code(caught.value) == 1
    assert lock_holder(folder) == ""


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_locked_by_another_version_is_reported_without_its_holder(folder: Path, content: str) -> None:
    with locked(folder):
        (folder / LOCK_NAME).write_text(content)
        assert lock_holder(folder) == "an unknown process"


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


OLD, NEW = {"kept.txt": "old", "only-old.txt": "x"}, {"kept.txt": "new", "deeper/only-new.txt": "y"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}


def make(path: Path, *, overwrite: bool = False, then: Callable[[], object] = lambda: None) -> None:
    with atomic_directory(path, overwrite=overwrite) as draft:
        write(draft, NEW)
        then()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder that exists."""
    write(tmp_path / "made", OLD)
    return tmp_path / "made"


@pytest.fixture(params=["exchange", "two renames"])
def each_way(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder."""
    if request.param == "two renames":
        monkeypatch.setattr(io, "_exchange", lambda *_: False)
    else:
        for name in "ab":
            (tmp_path / name).mkdir()
        can = io._exchange(tmp_path / "a", tmp_path / "b")
        for name in "ab":
            (tmp_path / name).rmdir()
        if not can:
            pytest.skip(reason="this file system cannot exchange names")
    return request.param


def test_atomic_directory_appears_complete_and_nothing_else_does(tmp_path: Path) -> None:
    path = tmp_path / "parent" / "made"
    with atomic_directory(path) as draft:
        assert draft.name == path.name and list(draft.iterdir()) == []
        write(draft, NEW)
        assert not path.exists()
    assert content(path) == NEW
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("inside"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [False, True])
def test_atomic_directory_of_a_failing_block_is_removed(tmp_path: Path, error: BaseException, exists: bool) -> None:
    path = tmp_path / "made"
    write(path, OLD if exists else {})

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        make(path, overwrite=exists, then=fail)
    assert content(path) == (OLD if exists else {})
    assert list(tmp_path.iterdir()) == [path] * exists


def test_atomic_directory_replaces_all_of_a_folder_only_when_told(old: Path, each_way: str) -> None:
    with raises(DataError, location=old):
        make(old)
    assert content(old) == OLD
    make(old, overwrite=True)
    assert content(old) == NEW
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("overwrite", [False, True])
def test_atomic_directory_takes_the_place_of_an_empty_folder_and_never_of_a_file(
    tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", overwrite=overwrite)
    assert content(tmp_path / "empty") == NEW
    (tmp_path / "file").write_text("mine")
    with raises(DataError, "a file", location=tmp_path / "file"):
        make(tmp_path / "file", overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file"}


def test_atomic_directory_does_not_replace_what_appeared_while_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "made"
    with pytest.raises(OSError, match=os.strerror(errno.ENOTEMPTY)):
        make(path, then=partial(write, path, OLD))
    assert content(path) == OLD
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_directory_is_made_by_one_at_a_time(old: Path) -> None:
    with atomic_directory(old, overwrite=True) as draft:
        with raises(DataError, "Another run", location=old):
            make(old, overwrite=True)
        write(draft, NEW)
    assert content(old) == NEW


def test_atomic_directory_of_a_link_replaces_its_target(old: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(old)
    make(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and content(old) == NEW


def test_atomic_directory_leaves_foreign_files_beside_its_draft(old: Path) -> None:
    write(unfinished_path(old), {"notes.txt": "mine"})
    make(old, overwrite=True)
    assert content(old) == NEW
    assert content(unfinished_path(old))["notes.txt"] == "mine"


def test_atomic_directory_is_on_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced, fsync = tmp_path / "made", [], os.fsync

    def note(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    make(path)
    draft = unfinished_path(path) / "draft" / path.name
    expected = {draft, draft / "deeper", *(draft / name for name in NEW)}
    assert {file for file, appeared in synced if not appeared} == expected
    assert synced[-1] == (tmp_path, True)


@pytest.mark.parametrize("failing", [1, 2])
def test_atomic_directory_that_cannot_be_renamed_leaves_the_old_one(
    old: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    calls, rename = [], os.rename

    def fail(*names: Path) -> None:
        calls.append(names)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(*names)

    monkeypatch.setattr(io, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        make(old, overwrite=True)
    assert content(old) == OLD
    assert list(old.parent.iterdir()) == [old]


def killed_before_step(work: Callable[[], None], step: int) -> bool:
    """Do the work in a process that is killed before its `step`-th change of the disk; False if there are fewer."""
    process = os.fork()
    if process == 0:
        left = [step]

        def counted(change: Callable[..., object], *arguments: object, **options: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        for name in ("mkdir", "rename", "unlink", "rmdir", "fsync"):
            setattr(os, name, partial(counted, getattr(os, name)))
        io._exchange = partial(counted, io._exchange)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("exists", [False, True])
def test_atomic_directory_killed_at_any_step_leaves_the_old_or_the_new_folder(
    tmp_path: Path, each_way: str, exists: bool
) -> None:
    before, seen = OLD if exists else {}, []
    for step in range(1, 100):
        path = tmp_path / str(step) / "made"
        write(path, before)
        killed = killed_before_step(partial(make, path, overwrite=True), step)
        found = content(path)
        if each_way == "two renames" and exists and not path.exists():
            seen.append("between the renames")
        else:
            assert found in (before, NEW)
            seen.append("new" if found == NEW else "old")
        if not killed:
            break
        with pytest.raises(RuntimeError), atomic_directory(path, overwrite=True):  # restores, and tidies up
            raise RuntimeError
        assert content(path) in ([OLD, NEW] if exists else [{}, NEW])
        assert list(path.parent.iterdir()) == [path] * path.exists()
    states = ["old", "between the renames", "new"] if exists and each_way == "two renames" else ["old", "new"]
    assert list(dict.fromkeys(seen)) == states and not killed


@pytest.mark.parametrize(
    ("error", "location", "transient"),
    [
        (OSError(errno.ENOSPC, "full"), "", False),
        (OSError(errno.EROFS, "read-only", "/out/a"), "/out/a", False),
        (OSError(errno.EACCES, "denied", b"/out/a"), "/out/a", False),
        (OSError(errno.ENOSPC, "full", "/in/a", None, "/out/a"), "/out/a", False),
        (OSError(errno.EIO, "input/output"), "", True),
        (OSError(errno.ESTALE, "stale", "/out/a"), "/out/a", True),
        (RuntimeError("No space left on device (os error 28)"), "", False),  # of libraries in Rust
    ],
)
def test_failure_of_a_disk_is_an_error_for_the_user(error: Exception, location: str, transient: bool) -> None:
    found = as_user_error(error)
    assert_error(found, DataError, location=location)
    assert isinstance(found, DataError) and found.transient == transient and exit_code(error) == (1 if transient else 2)


@pytest.mark.parametrize(
    "error",
    [OSError("no number"), OSError(errno.EPERM, "a process"), OSError(errno.EINVAL, "x", "y"), ValueError("28")],
)
def test_failure_of_anything_else_stays_a_defect(error: Exception) -> None:
    assert as_user_error(error) is error and exit_code(error) == 1


def test_atomic_writes_on_a_full_disk_name_the_file_and_leave_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        with pytest.raises(OSError, match="large") as file_error:
            io.write_atomically(tmp_path / "file", b"more than that")
        with pytest.raises(OSError, match="large") as folder_error, atomic_directory(tmp_path / "folder") as draft:
            (draft / "file").write_bytes(b"more than that")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_error(as_user_error(file_error.value), DataError, location=tmp_path / "file", remedy="ulimit -f")
    assert_error(as_user_error(folder_error.value), DataError, location=tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_atomic_directory_refuses_the_draft_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "made"
    for name in ("draft", "replaced"):
        write(unfinished_path(path) / name, OLD)
        with raises(DataError, "lock", location=unfinished_path(path)):
            make(path)
        assert content(unfinished_path(path) / name) == OLD and not path.exists()
        (unfinished_path(path) / "lock").touch()  # a run of this project was killed here
        make(path, overwrite=True)
        assert content(path) == NEW and list(tmp_path.iterdir()) == [path]
        shutil.rmtree(path)


def test_atomic_directory_checks_a_folder_before_and_after_the_block(old: Path) -> None:
    def check(folder: Path) -> None:
        if (folder / "notes.txt").exists():
            raise DataError("a foreign file", location=folder)

    def make_checked(then: object = None) -> None:
        with atomic_directory(old, overwrite=True, check=check) as draft:
            write(draft, NEW)
            if then:
                write(old, {"notes.txt": "mine"})

    for then in (True, False):
        with raises(DataError, location=old):
            make_checked(then)
        assert content(old) == OLD | {"notes.txt": "mine"} and list(old.parent.iterdir()) == [old]
    (old / "notes.txt").unlink()
    make_checked()
    assert content(old) == NEW


@pytest.mark.parametrize("name", ["a", "model-00001-of-00002.safetensors", "data/train.parquet", "..a", "a..b/c.", "~"])
def test_inner_name_of_a_file_in_the_folder_is_returned(name: str) -> None:
    assert io.check_inner_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "./.", "/", "/a", "//a", "..", "../a", "a/..", "a/../../b", "a\0b"])
def test_inner_name_outside_the_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        io.check_inner_name(name)


def test_sha256_of_all_is_in_order_and_raises_in_the_files_turn(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abcdefghijkl"]
    for path in paths:
        path.write_text(path.name * 1000)
    assert list(io.sha256_of_all(paths)) == [io.sha256_of(path) for path in paths]
    paths[3].unlink()
    hashes = io.sha256_of_all(paths)
    assert [next(hashes) for _ in range(3)] == [io.sha256_of(path) for path in paths[:3]]
    with pytest.raises(FileNotFoundError):
        next(hashes)
