"""Runs that end before their time: the same command goes on, and the bytes are those of an undisturbed run."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.errors import DataError
from preprocessing import output, ranges, workers
from preprocessing.build import BuildOptions, build
from preprocessing.ranges import RangeWorker
from preprocessing.readers import inputs as inputs_module
from preprocessing.work import PUBLISHED_NAME, WORK_FOLDER, WorkFolder

PREPROCESS = Path(__file__).resolve().parents[3] / "tools" / "preprocess.py"


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "LEAST_RANGE_TEXT_BYTES", 16_000)


@pytest.fixture
def options(tmp_path: Path, tokenizer_folder: Path) -> BuildOptions:
    """Six ranges of three kinds of file, to three partitions and two splits."""
    folder = tmp_path / "in"
    folder.mkdir()
    for file in range(3):
        lines = [
            json.dumps({"text": f"{n} words of file {n % 70} .\n" * (n % 9 + 1), "set": f"S {n % 3}"})
            for n in range(file, 300, 3)
        ]
        (folder / f"{file}.jsonl").write_text("\n".join([*lines, "bad"]) + "\n")
    return BuildOptions(
        [str(folder)],
        str(tokenizer_folder),
        tmp_path / "out",
        partition_by="set",
        split="train=0.7,valid=0.3",
        deduplicate=True,
        shard_tokens=900,
    )


@pytest.fixture
def expected(options: BuildOptions, tmp_path: Path) -> dict[str, bytes]:
    """The output of an undisturbed run."""
    build(replace(options, output=tmp_path / "undisturbed"))
    return content(tmp_path / "undisturbed")


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
    """A build that Ctrl-C ends where `replacement` raises it."""
    with mock.patch.object(owner, name, replacement), pytest.raises(KeyboardInterrupt):
        build(options)


@pytest.mark.parametrize("number", range(4))
def test_build_stopped_in_any_range_goes_on_after_the_last_finished_one(
    options: BuildOptions, expected: dict[str, bytes], number: int
) -> None:
    interrupted(options, RangeWorker, "tokenize", failing_at(number, KeyboardInterrupt()))
    assert num_done(options) == number
    assert no_dataset_in(options.output)
    with pytest.raises(DataError):
        TokenDataset(options.output)
    with mock.patch.object(RangeWorker, "tokenize", autospec=True, side_effect=RangeWorker.tokenize) as tokenize:
        build(options)
    assert tokenize.call_args_list[0].args[1] == number
    assert content(options.output) == expected


@pytest.mark.parametrize("step", range(0, 40, 3))
def test_build_stopped_while_publishing_goes_on(options: BuildOptions, expected: dict[str, bytes], step: int) -> None:
    left = [step]
    move = output._move

    def stopping(origin: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        move(origin, target)

    interrupted(options, output, "_move", stopping)
    build(options)
    assert content(options.output) == expected


def test_build_stopped_while_removing_the_work_folder_goes_on(
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
    finish, left = ranges.ShardWriter.finish, [9]

    def full(self: ranges.ShardWriter) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(options.output / "x"))
        return finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(ranges.ShardWriter, "finish", full)
        with pytest.raises(DataError, match=r"No space left.*Make room, and run the same command again"):
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
    original = ranges.RangeWorker.tokenize

    def tokenize(self: RangeWorker, number: int) -> None:
        last.rename(last.with_suffix(".away"))
        try:
            original(self, number)
        finally:
            last.with_suffix(".away").rename(last)

    with mock.patch.object(RangeWorker, "tokenize", tokenize), pytest.raises(DataError, match=r"2\.jsonl"):
        build(options)
    assert num_done(options) > 0
    build(options)
    assert content(options.output) == expected


def test_build_other_job_in_the_way_is_named_and_left_alone(options: BuildOptions, expected: dict[str, bytes]) -> None:
    interrupted(options, RangeWorker, "tokenize", failing_at(2, KeyboardInterrupt()))
    with pytest.raises(DataError, match=r"another job; it differs in shard_tokens, rule|rule.*shard_tokens"):
        build(replace(options, shard_tokens=901, segments="newline"))
    changed = Path(options.inputs[0]) / "1.jsonl"
    status = changed.stat()
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    with pytest.raises(DataError, match=r"differs in inputs .*1\.jsonl"):
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


def test_build_two_runs_at_once_are_refused(options: BuildOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocessing.work.LOCK_WAIT_S", 0.0)
    with WorkFolder(options.output).locked(alone=False), pytest.raises(DataError, match="Another run"):
        build(options)
    build(options)


@pytest.mark.parametrize("on_difference", ["stop", "fall-back"])
def test_build_wrong_fast_tokenizer_stops_or_falls_back(
    options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_difference: str
) -> None:
    build(replace(options, backend="stock", output=tmp_path / "stock"))
    wrong = replace(options, check_share=1.0, on_difference=on_difference)
    with monkeypatch.context() as patch:
        patch.setattr("preprocessing.tokenize.open_backend", _open_wrong_backend)
        if on_difference == "stop":
            with pytest.raises(
                DataError, match=r"disagree from token .*'261 words.*0\.jsonl, from byte \d+, line 13\]"
            ):
                build(wrong)
            assert no_dataset_in(options.output)
            return
        build(wrong)
    assert content(options.output) == content(tmp_path / "stock")


def _open_wrong_backend(tokenizer: object, name: str, special_in_text: bool, share: float) -> object:
    """Wrong about a text that comes after some that it was right about."""
    from tests.unit.preprocessing.test_backend import CheckedBackend, StockBackend, Wrong

    class WrongLater(Wrong):
        def encode(self, texts: list[str]) -> object:
            return super().encode([text.replace("61 words", "wrong words") for text in texts])

    stock = StockBackend(tokenizer)
    return CheckedBackend(stock if name == "stock" else WrongLater(tokenizer), stock, share)


def test_do_ranges_worker_that_dies_is_an_error_and_its_work_is_done_later(
    options: BuildOptions, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(workers, "_work", _die)
        with pytest.raises(DataError, match=r"worker process died \(exit code -9.*fewer --workers"):
            build(replace(options, workers=2))
    build(replace(options, workers=2))
    assert content(options.output) == expected


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_share_out_gives_neighbours_and_like_weights() -> None:
    weights = [1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 8.0, 1.0]
    runs = workers.share_out(list(range(10)), weights, 3)
    assert [number for run in runs for number in run] == list(range(10))
    assert [sum(weights[number] for number in run) for run in runs] == [8.0, 12.0, 1.0] or max(
        sum(weights[number] for number in run) for run in runs
    ) <= sum(weights) / 3 + max(weights)
    assert workers.share_out([], [], 2) == [[], []]


@pytest.mark.parametrize("after", [0, 2, 5])
def test_preprocess_killed_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, tokenizer_folder: Path, after: int
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n} words of a text .\n" * 40}) + "\n" for n in range(9000)))

    def command(name: str) -> list[str]:
        paths = ["--input", str(file), "--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / name)]
        return [sys.executable, str(PREPROCESS), *paths, "--shard-tokens", "250000", "--workers", "2"]

    subprocess.run(command("whole"), check=True, capture_output=True)
    process = subprocess.Popen(command("out"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until_s = time.monotonic() + 60
    while len(list((tmp_path / "out" / WORK_FOLDER).glob("*/range.json"))) < after and time.monotonic() < until_s:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run(command("out"), check=True, capture_output=True, text=True)
    assert not after or "ranges are done" in again.stderr
    assert content(tmp_path / "out") == content(tmp_path / "whole")
