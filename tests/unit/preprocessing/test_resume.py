"""An interrupted run is resumed by the same command, and ends with the bytes of an uninterrupted run."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.errors import DataError
from megatron_bipe.io import locked
from preprocessing import build as build_module
from preprocessing import commit, range_worker
from preprocessing.build import BuildOptions, build
from preprocessing.document_tokenizer import CheckedBackend, StockBackend, TokenizerDifferenceError
from preprocessing.range_worker import RangeWorker
from preprocessing.readers import inputs as inputs_module
from preprocessing.readers.lines import LineReader
from preprocessing.work_dir import PUBLISHED_NAME, WORK_FOLDER, WorkFolder
from tests.helpers.backends import Wrong
from tests.helpers.errors import raises
from tests.helpers.tools import call_tool

PREPROCESS = Path(__file__).resolve().parents[3] / "tools" / "preprocess.py"


DEFAULT_SIZES = (inputs_module.LEAST_RANGE_TEXT_BYTES, LineReader.blocks.__defaults__)


@contextmanager
def range_sizes(least_bytes: int, block_bytes: tuple[Any, ...] | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs_module, "LEAST_RANGE_TEXT_BYTES", least_bytes)
        patch.setattr(LineReader.blocks, "__defaults__", block_bytes)
        yield


@pytest.fixture(scope="module", autouse=True)
def small_ranges() -> Iterator[None]:
    with range_sizes(16_000, (1000,)):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for file in range(3):
        lines = [
            json.dumps({"text": f"{n} words of file {n % 70} .\n" * (n % 9 + 1), "set": f"S {n % 3}"})
            for n in range(file, 300, 3)
        ]
        (folder / f"{file}.jsonl").write_text("\n".join([*lines, "bad"]) + "\n")
    return folder


def options_for(corpus: Path, tokenizer_folder: Path, output: Path) -> BuildOptions:
    """Thirteen ranges of three files, to three partitions and two splits."""
    return BuildOptions(
        [str(corpus)],
        str(tokenizer_folder),
        output,
        partition_by="set",
        split="train=0.7,valid=0.3",
        deduplicate=True,
        shard_tokens=900,
    )


@pytest.fixture
def options(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> BuildOptions:
    return options_for(corpus, tokenizer_folder, tmp_path / "out")


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of an uninterrupted run."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    build(options_for(corpus, tokenizer_folder, output))
    return output


@pytest.fixture
def expected(undisturbed: Path) -> dict[str, bytes]:
    return content(undisturbed)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def num_done(options: BuildOptions) -> int:
    return len(list((options.output / WORK_FOLDER).glob("*/range.json")))


def no_dataset_in(folder: Path) -> bool:
    return not list(folder.rglob("manifest.json"))


def failing_at(number: int, error: BaseException) -> Callable[[RangeWorker, int], None]:
    original = RangeWorker.tokenize

    def tokenize(self: RangeWorker, n: int) -> None:
        if n == number:
            raise error
        original(self, n)

    return tokenize


def interrupted(options: BuildOptions, owner: object, name: str, replacement: object) -> None:
    """Run a build in which `replacement` raises KeyboardInterrupt."""
    with mock.patch.object(owner, name, replacement), pytest.raises(KeyboardInterrupt):
        build(options)


STEPS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def dies_before_step(number: int, options: BuildOptions) -> bool:
    """Build in another process, which exits without clean-up before the given one of its writes to the disk."""
    child = os.fork()
    if child == 0:
        steps = iter(range(number))
        sys.addaudithook(lambda event, _: os._exit(9) if event in STEPS and next(steps, None) is None else None)
        build(options)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("overwrite", [False, True])
def test_build_that_dies_at_any_step_leaves_no_broken_dataset_and_resumes(
    options: BuildOptions, undisturbed: Path, overwrite: bool
) -> None:
    options = replace(options, partition_by=None, split=None, shard_tokens=4000, overwrite=overwrite, backend="stock")
    uninterrupted = replace(options, output=options.output.with_name("uninterrupted"))
    build(uninterrupted)
    for number in itertools.count(40, 61):
        shutil.rmtree(options.output, ignore_errors=True)
        if overwrite:
            shutil.copytree(undisturbed, options.output)
        died = dies_before_step(number, options)
        for manifest in options.output.rglob("manifest.json"):
            TokenDataset(manifest.parent)
        if not died:
            break
        build(options)
        assert content(options.output) == content(uninterrupted.output)


@pytest.mark.parametrize("number", range(4))
def test_build_stopped_in_any_range_resumes_after_the_last_finished_one(
    options: BuildOptions, expected: dict[str, bytes], number: int
) -> None:
    interrupted(options, RangeWorker, "tokenize", failing_at(number, KeyboardInterrupt()))
    assert num_done(options) == number
    assert no_dataset_in(options.output)
    with raises(DataError, "manifest.json", location=options.output):
        TokenDataset(options.output)
    with mock.patch.object(RangeWorker, "tokenize", autospec=True, side_effect=RangeWorker.tokenize) as tokenize:
        build(options)
    assert tokenize.call_args_list[0].args[1] == number
    assert content(options.output) == expected


@pytest.mark.parametrize("step", range(0, 40, 3))
def test_build_stopped_while_publishing_resumes(options: BuildOptions, expected: dict[str, bytes], step: int) -> None:
    left = [step]
    move = commit._move

    def stopping(origin: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        move(origin, target)

    interrupted(options, commit, "_move", stopping)
    build(options)
    assert content(options.output) == expected


def test_build_stopped_while_removing_the_work_folder_resumes(
    options: BuildOptions, expected: dict[str, bytes]
) -> None:
    def half(self: WorkFolder) -> None:
        if self.has(PUBLISHED_NAME):
            (self.range_folder(0) / "range.json").unlink()
            raise KeyboardInterrupt

    interrupted(options, WorkFolder, "remove", half)
    assert WORK_FOLDER in {path.name for path in options.output.iterdir()}
    made = build(options)
    assert len(made) == 6
    assert content(options.output) == expected


def test_build_disk_full_keeps_finished_shards(
    options: BuildOptions, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, left = range_worker.ShardWriter.finish, [9]

    def full(self: range_worker.ShardWriter) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(options.output / "x"))
        return finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(range_worker.ShardWriter, "finish", full)
        with raises(DataError, os.strerror(errno.ENOSPC), location=options.output / "x"):
            build(options)
    done = num_done(options)
    assert done > 0
    assert not list(options.output.rglob("*.partial"))
    build(options)
    assert content(options.output) == expected


def test_build_input_that_becomes_unreadable_keeps_finished_shards(
    options: BuildOptions, expected: dict[str, bytes]
) -> None:
    last = Path(options.inputs[0]) / "2.jsonl"
    original = range_worker.RangeWorker.tokenize

    def tokenize(self: RangeWorker, number: int) -> None:
        last.rename(last.with_suffix(".away"))
        try:
            original(self, number)
        finally:
            last.with_suffix(".away").rename(last)

    with mock.patch.object(RangeWorker, "tokenize", tokenize), raises(DataError, location=last):
        build(options)
    assert num_done(options) > 0
    build(options)
    assert content(options.output) == expected


def test_build_missing_finished_shard_is_an_error(options: BuildOptions, expected: dict[str, bytes]) -> None:
    interrupted(options, build_module, "publish", mock.Mock(side_effect=KeyboardInterrupt))
    (options.output / WORK_FOLDER / "00001" / "000.idx").unlink()
    with raises(DataError, location="unfinished/00001/000.idx", remedy="--overwrite"):
        build(options)
    assert no_dataset_in(options.output)
    shutil.rmtree(options.output / WORK_FOLDER)
    build(replace(options, overwrite=True))
    assert content(options.output) == expected


def test_build_unfinished_work_of_another_job_is_named_and_kept(
    options: BuildOptions, expected: dict[str, bytes]
) -> None:
    interrupted(options, RangeWorker, "tokenize", failing_at(2, KeyboardInterrupt()))
    with raises(DataError, "shard_tokens", "rule", location=options.output / WORK_FOLDER, remedy="--overwrite"):
        build(replace(options, shard_tokens=901, segments="newline"))
    changed = Path(options.inputs[0]) / "1.jsonl"
    status = changed.stat()
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    with raises(DataError, "inputs", changed, location=options.output / WORK_FOLDER, remedy="--overwrite"):
        build(options)
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert num_done(options) == 2
    build(replace(options, max_malformed=7, workers=2, overwrite=True))  # none of these decides the bytes
    assert content(options.output) == expected
    other = replace(options, shard_tokens=901)
    build(replace(other, output=options.output.with_name("fresh")))
    interrupted(replace(options, overwrite=True), RangeWorker, "tokenize", failing_at(2, KeyboardInterrupt()))
    assert content(options.output).items() > expected.items()  # the old data stays until the new is there
    build(replace(other, overwrite=True))
    assert content(options.output) == content(options.output.with_name("fresh"))


@pytest.mark.parametrize(
    "change",
    [
        {"text_key": "set"},
        {"partition_by": None},
        {"split": None},
        {"shard_tokens": 7},
        {"special_in_text": True},
        {"append_eos": True},
        {"deduplicate": False},
    ],
)
def test_build_option_that_decides_the_bytes_makes_another_job(
    options: BuildOptions, change: dict[str, object]
) -> None:
    interrupted(options, RangeWorker, "hash_texts", mock.Mock(side_effect=KeyboardInterrupt))
    with raises(DataError, *change, location=options.output / WORK_FOLDER, remedy="--overwrite"):
        build(replace(options, **change))


def test_build_limits_of_malformed_lines_stop_a_run_early_and_hold_over_resumption(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    blank, good = " " * 14_000 + "\n", '{"text": "a"}\n'
    parts = [good * 2000, "bad\n" * 9 + good * 100 + blank, "bad\n" * 9 + good * 100 + blank, good * 1000]
    for n, part in enumerate(parts):
        (tmp_path / f"{n}.jsonl").write_text(part)
    options = BuildOptions([str(tmp_path)], str(tokenizer_folder), tmp_path / "out" / "a")
    with raises(DataError, 18, 2218, 10, location=tmp_path / "2.jsonl", remedy="--max-malformed"):
        build(replace(options, max_malformed=10))
    assert num_done(options) == 4  # of five: the first file makes two, the last was not begun
    (tmp_path / "1.jsonl").write_text("bad\n" * 11 + good * 100 + blank)
    options = replace(options, output=tmp_path / "out" / "b")
    with raises(DataError, 11, 111, 10, location=tmp_path / "1.jsonl", remedy="--max-malformed"):
        build(options)
    assert num_done(options) == 3
    (tmp_path / "1.jsonl").write_text(parts[1])
    options = replace(options, output=tmp_path / "out" / "c")
    interrupted(options, RangeWorker, "tokenize", failing_at(2, KeyboardInterrupt()))
    (manifest,) = build(options).values()  # no range alone has too many, nor have all together
    assert manifest.source["malformed_lines"] == 18


def test_build_two_runs_at_once_are_refused(options: BuildOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_bipe.io.LOCK_WAIT_S", 0.0)
    with locked(options.output / WORK_FOLDER), raises(DataError, "Another run", location=options.output):
        build(options)
    build(options)


def test_build_that_waited_for_another_run_sees_its_dataset(
    options: BuildOptions, undisturbed: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ExitStack()
    other.enter_context(locked(options.output / WORK_FOLDER))

    def the_other_ends(_: float) -> None:
        shutil.copytree(undisturbed, options.output, dirs_exist_ok=True)
        other.close()

    monkeypatch.setattr(time, "sleep", the_other_ends)
    with raises(DataError, location=options.output, remedy="--overwrite"):
        build(replace(options, shard_tokens=5000))
    assert content(options.output) == expected


def test_build_disk_full_at_any_write_is_one_error_and_the_next_run_resumes(
    options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, partition_by=None, split=None, shard_tokens=4000)
    build(replace(options, output=tmp_path / "uninterrupted"))
    fsync = os.fsync
    for number in itertools.count(0, 7):
        left = iter(range(number))

        def full(descriptor: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with suppress(DataError) if number else raises(DataError, os.strerror(errno.ENOSPC)):
                build(options)
        written = next(left, None) is not None
        if not written:
            build(options)
        assert content(options.output) == content(tmp_path / "uninterrupted")
        if written:
            break
        shutil.rmtree(options.output)


@pytest.mark.parametrize("way_out", [{"on_difference": "fall-back"}, {"backend": "stock"}])
def test_build_wrong_fast_tokenizer_is_refused_until_an_option_allows_it(
    options: BuildOptions, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, way_out: dict[str, str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("preprocessing.document_tokenizer.open_backend", _open_wrong_backend)
        with raises(TokenizerDifferenceError, "'261 words", remedy="--backend stock") as error:
            build(replace(options, check_share=1.0))
        assert re.search(r"/0\.jsonl, from byte \d+, line \d+$", error.value.location)
        with raises(DataError, "gigatoken", location=options.output, remedy="--on-difference"):
            build(replace(options, check_share=0.0))  # would not see it
        assert no_dataset_in(options.output)
        with mock.patch("preprocessing.document_tokenizer.open_backend", side_effect=_open_wrong_backend) as opened:
            build(replace(options, check_share=0.0, **way_out))
    assert {call.args[1] for call in opened.call_args_list} == {"stock"}
    assert content(options.output) == expected


def test_build_wrong_fast_tokenizer_is_known_even_if_nothing_is_done_yet(options: BuildOptions) -> None:
    class Wrong:
        dtype = np.dtype(np.uint16)

        def __init__(self, recipe: object) -> None: ...

        def __call__(self, documents: object) -> None:
            raise TokenizerDifferenceError("disagree")

    with (
        mock.patch("preprocessing.range_worker.DocumentTokenizer", Wrong),
        raises(TokenizerDifferenceError, "disagree"),
    ):
        build(options)
    with raises(DataError, "gigatoken", location=options.output, remedy="--on-difference"):
        build(options)


def test_build_wrong_fast_tokenizer_falls_back_in_the_middle_of_a_range(
    options: BuildOptions, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocessing.document_tokenizer.open_backend", _open_wrong_backend)
    with mock.patch.object(RangeWorker, "tokenize", autospec=True, side_effect=RangeWorker.tokenize) as tokenize:
        build(replace(options, check_share=1.0, on_difference="fall-back"))
    numbers = [call.args[1] for call in tokenize.call_args_list]
    count = len(set(numbers))
    assert numbers == [*range(count), *range(len(numbers) - count)]  # what came before the difference, once more
    assert count < len(numbers) < 2 * count
    assert content(options.output) == expected


def _open_wrong_backend(tokenizer: object, name: str, special_in_text: bool, share: float) -> object:
    """Backend that is wrong for a text in the middle of a range."""

    class WrongLater(Wrong):
        def encode(self, texts: list[str]) -> object:
            return super().encode([text.replace("61 words", "wrong words") for text in texts])

    stock = StockBackend(tokenizer)
    return CheckedBackend(stock if name == "stock" else WrongLater(tokenizer), stock, share)


def test_preprocess_killed_resumes_and_ends_with_the_same_bytes(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n} words of a text .\n" * 40}) + "\n" for n in range(9000)))

    def options(name: str) -> list[str]:
        paths = ["--input", str(file), "--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / name)]
        return [*paths, "--shard-tokens", "250000", "--workers", "2"]

    process = subprocess.Popen(
        [sys.executable, str(PREPROCESS), *options("out")], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    until_s = time.monotonic() + 240
    while len(list((tmp_path / "out" / WORK_FOLDER).glob("*/range.json"))) < 3 and time.monotonic() < until_s:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with range_sizes(*DEFAULT_SIZES):  # those of the process
        again = call_tool("preprocess", *options("out"))
        assert "ranges are done" in again.output
        call_tool("preprocess", *options("uninterrupted"), "--workers", 1)
    assert content(tmp_path / "out") == content(tmp_path / "uninterrupted")
