"""The work folder shows the state of an unfinished output after any interruption."""

import itertools
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from megatron_bipe.errors import DataError
from preprocessing.work_dir import JOB_NAME, PUBLISHED_NAME, STOCK_NAME, WorkFolder
from tests.helpers.errors import raises

JOB = {"inputs": [["a.jsonl", 3, "1"], ["b.jsonl", 4, "1"]], "text_key": "text", "split": None}
FILES = ["manifest.json"]


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    made = WorkFolder(tmp_path / "out")
    made.begin(JOB, [], overwrite=False)
    (made.output / "manifest.json").touch()
    made.range_folder(0).mkdir()
    (made.range_folder(0) / "000.bin").touch()
    return made


@pytest.mark.parametrize("backwards", [False, True])
def test_remove_interrupted_anywhere_leaves_no_job_that_looks_unpublished(work: WorkFolder, backwards: bool) -> None:
    class Killed(BaseException):
        pass

    unlink, iterdir = Path.unlink, Path.iterdir
    for number in itertools.count():
        work.begin(JOB, FILES, overwrite=True)
        for mark in (STOCK_NAME, PUBLISHED_NAME):
            work.mark(mark)
        left = iter(range(number))

        def dying(path: Path, missing_ok: bool = False, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Killed
            unlink(path, missing_ok)

        with (
            mock.patch.object(Path, "iterdir", lambda path: sorted(iterdir(path), reverse=backwards)),
            mock.patch.object(Path, "unlink", dying),
            suppress(Killed),
        ):
            work.remove()
            break
        assert work.has(PUBLISHED_NAME) or not (work.path / JOB_NAME).exists()
    assert number > 3 and list(work.path.iterdir()) == []


def test_remove_interrupted_among_the_ranges_keeps_the_published_mark(work: WorkFolder) -> None:
    work.mark(PUBLISHED_NAME)
    with mock.patch.object(Path, "rmdir", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        work.remove()
    assert work.has(PUBLISHED_NAME) and (work.path / JOB_NAME).exists()


@pytest.mark.parametrize(
    ("new", "files"),
    [
        ({"text_key": "body"}, []),
        ({"split": "a=1", "text_key": "body"}, []),
        ({"inputs": [["a.jsonl", 3, "1"], ["b.jsonl", 5, "1"]]}, ["b.jsonl"]),
        ({"inputs": [["a.jsonl", 3, "1"]]}, ["b.jsonl"]),
        ({"inputs": [[f"{n}.jsonl", 3, "1"] for n in range(9)]}, ["0.jsonl", "1.jsonl", "2.jsonl"]),
        ({"inputs": JOB["inputs"][::-1]}, []),  # in another order
        ({"later": 1}, []),
    ],
)
def test_begin_other_job_is_refused_and_the_difference_named(
    work: WorkFolder, new: dict[str, object], files: list[str]
) -> None:
    with raises(DataError, location=work.path, remedy="--overwrite") as error:
        work.begin(JOB | new, [], overwrite=False)
    assert {key for key in (*JOB, "later") if key in error.value.message} == set(new)
    assert re.findall(r"\w\.jsonl", error.value.message) == files
    assert work.range_folder(0).exists()
    work.begin(JOB | new, [], overwrite=True)
    assert not work.range_folder(0).exists()


def test_begin_same_job_resumes_in_any_state(work: WorkFolder) -> None:
    work.begin(JOB, FILES, overwrite=False)
    assert work.range_folder(0).exists()


@pytest.mark.parametrize("content", ["", "{", "\xff"])
def test_begin_damaged_job_is_an_error(work: WorkFolder, content: str) -> None:
    (work.path / JOB_NAME).write_bytes(content.encode("latin-1"))
    with raises(DataError, location=work.path / JOB_NAME):
        work.begin(JOB, [], overwrite=True)


OUTSIDE = (
    '{"shards": [{"destination": ["../x", ""], "shard": {}}], "ends": [], "lines": 0, "documents": 0, "empty": 0, '
    '"duplicates": 0, "malformed": 0, "first_malformed": [], "backend": "tokenizers", "malformed_pieces": []}'
)


@pytest.mark.parametrize("content", ["", "{}", "[]", "\xff", OUTSIDE])
def test_load_range_damaged_record_is_an_error(work: WorkFolder, content: str) -> None:
    (work.range_folder(0) / "range.json").write_bytes(content.encode("latin-1"))
    assert work.is_done(0)
    with raises(DataError, location=work.range_folder(0) / "range.json"):
        work.load_range(0)
