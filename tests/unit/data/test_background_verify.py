"""Shards are compared with the manifest after their first read, and monitored for later changes."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_bipe.data import background_verify
from megatron_bipe.data.background_verify import BackgroundVerifier
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.errors import DataError
from megatron_bipe.io import sha256_of
from tests.helpers.errors import raises

Write = Callable[..., Manifest]
DOCUMENTS = [[[1, 2, 3, 4] * 2000]] * 3


@pytest.fixture
def dataset(write_dataset: Write, tmp_path: Path) -> TokenDataset:
    write_dataset(tmp_path, DOCUMENTS)
    return TokenDataset(tmp_path)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_verify, "LOOK_S", 0.01)
    monkeypatch.setattr(background_verify, "FIRST_LOOK_S", 0.01)


def read(dataset: TokenDataset) -> None:
    """Read from all shards."""
    dataset.sequences(np.arange(dataset.num_sequences(100)), 100)


def until_found(check: BackgroundVerifier, seconds: float = 20.0) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        check.raise_if_failed()
        time.sleep(0.01)


def until_verified(check: BackgroundVerifier, files: int) -> None:
    until_s = time.monotonic() + 20.0
    while len(check._verified) < files:
        check.raise_if_failed()
        assert time.monotonic() < until_s
        time.sleep(0.01)


def flip(path: Path, keep_time: bool = False) -> None:
    """Change a byte so that the id is another one of the vocabulary."""
    status = path.stat()
    with path.open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-2, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("suffix", ["bin", "seg"])
def test_shard_damaged_before_it_is_read_is_found_and_named(dataset: TokenDataset, suffix: str) -> None:
    path = dataset.path / f"part-00001.{suffix}"
    first_sum = sha256_of(path)
    flip(path)
    both = (first_sum, sha256_of(path))
    with BackgroundVerifier(dataset.shards) as check:
        read(dataset)
        with raises(DataError, "SHA-256", *both, location=f"part-00001.{suffix}"):
            until_found(check)


def test_intact_shards_are_read_once_and_reported_intact(dataset: TokenDataset) -> None:
    with BackgroundVerifier(dataset.shards) as check:
        read(dataset)
        until_verified(check, files=6)
        flip(dataset.path / "part-00001.bin", keep_time=True)  # not detected: the file would have to be read again
        time.sleep(0.2)
        check.raise_if_failed()


def test_shard_not_read_from_is_not_checked(dataset: TokenDataset) -> None:
    flip(dataset.path / "part-00002.bin")
    with BackgroundVerifier(dataset.shards) as check:
        dataset.sequences(np.array([0]), 100)
        until_verified(check, files=2)
        time.sleep(0.2)
        check.raise_if_failed()


def test_shard_changed_during_the_run_is_an_error_that_names_it(dataset: TokenDataset) -> None:
    with BackgroundVerifier(dataset.shards) as check:
        read(dataset)
        until_verified(check, files=6)
        flip(dataset.path / "part-00001.bin")
        with raises(DataError, "SHA-256", location="part-00001.bin"):
            until_found(check)


def test_shard_that_vanishes_during_the_run_is_an_error_that_names_it(dataset: TokenDataset) -> None:
    with BackgroundVerifier(dataset.shards) as check:
        read(dataset)
        until_verified(check, files=6)
        (dataset.path / "part-00002.seg").unlink()
        read(dataset)  # of the file that is still open
        with raises(DataError, location="part-00002.seg"):
            until_found(check)


def test_shard_cut_short_during_the_run_is_an_error_and_no_crash(dataset: TokenDataset) -> None:
    with BackgroundVerifier(dataset.shards) as check:
        read(dataset)
        until_verified(check, files=6)
        os.truncate(dataset.path / "part-00000.bin", 100)
        with raises(DataError, 100, 16000, location="part-00000.bin"):
            until_found(check)
        with raises(DataError, 100, location="part-00000.bin"):
            read(dataset)


def test_shard_touched_or_copied_again_is_read_again_and_intact(dataset: TokenDataset) -> None:
    path = dataset.path / "part-00000.bin"
    with BackgroundVerifier(dataset.shards) as check:
        read(dataset)
        until_verified(check, files=6)
        seen = check._verified[path]
        content = path.read_bytes()
        path.with_suffix(".copy").write_bytes(content)
        path.with_suffix(".copy").replace(path)
        until_s = time.monotonic() + 20.0
        while check._verified[path] == seen:
            check.raise_if_failed()
            assert time.monotonic() < until_s


def test_shard_check_closes_immediately_with_unread_data(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_verify, "_WORK_SHARE", 1e-9)  # pauses of hours
    with BackgroundVerifier(dataset.shards) as check:
        read(dataset)
        time.sleep(0.1)
    assert not check._thread.is_alive() and not check._verified


def test_shard_check_of_nothing_starts_nothing() -> None:
    with BackgroundVerifier(()) as check:
        check.raise_if_failed()
        assert not check._thread.is_alive()
