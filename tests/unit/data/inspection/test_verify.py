"""Verification of intact and damaged datasets."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspection import verify
from megatron_bipe.data.inspection.verify import find_problems
from megatron_bipe.data.manifest import Manifest, SegmentRule
from megatron_bipe.errors import DataError
from megatron_bipe.io import sha256_of
from tests.helpers.datasets import FEW_TEXTS
from tests.helpers.errors import assert_error, raises

Write = Callable[..., Manifest]


def problems(folder: Path) -> list[DataError]:
    return list(find_problems([TokenDataset(folder)]))


def flip(path: Path, offset: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def rehash(folder: Path, manifest: Manifest, **changes: object) -> None:
    """Make the manifest agree with the files as they are, so that only the other checks can find anything."""
    shards = [
        shard.model_copy(
            update={
                "files": {
                    suffix: file.model_copy(update={"sha256": sha256_of(folder / f"{shard.name}.{suffix}")})
                    for suffix, file in shard.files.items()
                }
            }
        )
        for shard in manifest.shards
    ]
    manifest.model_copy(update={"shards": tuple(shards)} | changes).save(folder)


@pytest.mark.parametrize("spec", ["newline", "fixed:3", "fixed:5", "sentence", '["a","\\n"]'])
def test_verify_of_an_intact_dataset_finds_nothing(
    write_text_dataset: Write, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "CHUNK_TOKENS", 8)  # several chunks in a few tokens
    manifest = write_text_dataset(tmp_path, FEW_TEXTS, spec)
    read: list[int] = []
    assert list(find_problems([TokenDataset(tmp_path)], workers=2, advance=read.append)) == []
    assert sum(read) == sum(file.bytes for shard in manifest.shards for file in shard.files.values())


@pytest.mark.parametrize("suffix", ["bin", "idx", "seg"])
def test_verify_of_any_flipped_bit_finds_it(folder: Path, suffix: str) -> None:
    path = folder / f"part-00000.{suffix}"
    header = {"bin": 0, "idx": 34, "seg": 24}[suffix]
    for offset in range(header, path.stat().st_size):
        for mask in (0x01, 0x80):
            flip(path, offset, mask)
            found = problems(folder)
            assert_error(found[0], DataError, "SHA-256", location=path)
            assert 1 <= len(found) <= 2
            flip(path, offset, mask)


def test_verify_of_a_wrong_bit_names_its_location_and_the_rule(folder: Path) -> None:
    flip(folder / "part-00000.seg", 24, 0b1000)
    rehash(folder, Manifest.load(folder))
    [found] = problems(folder)
    assert_error(found, DataError, 24, 3, 1, 0, "'newline'", location="part-00000.seg")


def test_verify_of_a_wrong_bit_in_a_fixed_rule_names_its_location(write_text_dataset: Write, tmp_path: Path) -> None:
    write_text_dataset(tmp_path, FEW_TEXTS, "fixed:3")
    flip(tmp_path / "part-00000.seg", 25, 0b1)
    rehash(tmp_path, Manifest.load(tmp_path))
    [found] = problems(tmp_path)
    assert_error(found, DataError, 25, 8, 0, 1, "'fixed:3'", location="part-00000.seg")


def test_verify_of_padding_that_is_not_zero_names_the_byte(folder: Path) -> None:
    assert TokenDataset(folder).shards[0].num_tokens == 17
    flip(folder / "part-00000.seg", 26, 0b10)
    rehash(folder, Manifest.load(folder))
    [found] = problems(folder)
    assert_error(found, DataError, 26, 17, location="part-00000.seg")


def test_verify_of_a_wrong_segment_count_names_both(folder: Path) -> None:
    manifest = Manifest.load(folder)
    shards = (manifest.shards[0].model_copy(update={"segments": 5}), *manifest.shards[1:])
    manifest.model_copy(update={"shards": shards}).save(folder)
    [found] = problems(folder)
    assert_error(found, DataError, 4, 5, location="part-00000.seg")


def test_verify_of_a_token_outside_the_vocabulary_names_it(folder: Path) -> None:
    flip(folder / "part-00000.bin", 7, 0x80)
    token = int(np.fromfile(folder / "part-00000.bin", "<u2")[3])
    rehash(folder, Manifest.load(folder))
    [found] = problems(folder)
    assert_error(found, DataError, 3, 6, token, 288, location="part-00000.bin")


def test_verify_without_the_tokenizer_reports_that_and_continues(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    flip(folder / "part-00002.bin", 0)
    found = problems(folder)
    assert_error(found[0], DataError, location=folder / "tokenizer")
    assert_error(found[1], DataError, "SHA-256", location="part-00002.bin")


def test_verify_with_another_tokenizer_names_both_fingerprints(folder: Path) -> None:
    definition = folder / "tokenizer" / "tokenizer.json"
    made_with = sha256_of(definition)
    definition.write_text(json.dumps(json.loads(definition.read_bytes()), indent=1))
    [found] = problems(folder)
    assert_error(found, DataError, "letters", made_with, sha256_of(definition))


def test_verify_of_a_rule_that_resolves_otherwise_says_so(folder: Path) -> None:
    manifest = Manifest.load(folder)
    newline = manifest.rule.token_ids
    rehash(folder, manifest, rule=SegmentRule(spec="sentence", token_ids=newline))
    [found] = problems(folder)
    assert_error(found, DataError, "rule.token_ids", 1, "'sentence'", 3, location="manifest.json")


def test_verify_finds_every_problem_in_the_order_of_the_shards_for_any_number_of_workers(
    write_text_dataset: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "CHUNK_TOKENS", 8)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_text_dataset(folder, [[f"{'x' * (60 - 9 * n)}\n"] for n in range(6)])
        for n in (1, 4):
            flip(folder / f"part-0000{n}.seg", 24)
            flip(folder / f"part-0000{n}.bin", 40, 0x80)
    datasets = [TokenDataset(folder) for folder in folders]
    found = [list(find_problems(datasets, workers=number)) for number in (1, 2, 5)]
    texts = [list(map(str, problems)) for problems in found]
    assert texts[0] == texts[1] == texts[2]
    expected = [
        (observed, folder / f"part-0000{n}.{suffix}")
        for folder in folders
        for n in (1, 4)
        for observed, suffix in [(["SHA-256"], "bin"), (["SHA-256"], "seg"), ([24, 0, "'newline'"], "seg")]
    ]
    for problem, (observed, location) in zip(found[0], expected, strict=True):
        assert_error(problem, DataError, *observed, location=location)


def test_verify_after_damage_in_an_early_chunk_still_computes_the_full_checksum(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "CHUNK_TOKENS", 8)
    flip(folder / "part-00000.seg", 24)
    rehash(folder, Manifest.load(folder))
    [found] = problems(folder)
    assert_error(found, DataError, 24, 0, "'newline'", location="part-00000.seg")


def test_verify_of_a_sample_skips_bits_but_not_checksums_and_counts(
    write_text_dataset: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "CHUNK_TOKENS", 8)
    write_text_dataset(tmp_path, [["xy\n" * 400]])
    seg = tmp_path / "part-00000.seg"
    content = np.frombuffer(seg.read_bytes(), dtype=np.uint8).copy()
    content[24:-1] = np.roll(content[24:-1], 1)  # the same number of ends, at other positions
    seg.write_bytes(content.tobytes())
    dataset = TokenDataset(tmp_path)
    shares = (0.0, 0.05, 0.5, 1.0)
    for share in shares:
        assert_error(next(find_problems([dataset], sample=share)), DataError, "SHA-256", location=seg)
    rehash(tmp_path, Manifest.load(tmp_path))
    dataset = TokenDataset(tmp_path)
    positions = []
    for share in shares:
        rest = [str(problem) for problem in find_problems([dataset], sample=share)]
        assert rest == [str(problem) for problem in find_problems([dataset], sample=share)]  # always the same chunks
        positions.append(int(re.search(r"token (\d+)", rest[0])[1]) if rest else 10**9)
    assert positions[0] == 10**9 > positions[1] >= positions[2] >= positions[3]
    assert positions[1] > positions[3]
    shard = dataset.manifest.shards[0]
    dataset.manifest.model_copy(update={"shards": (shard.model_copy(update={"segments": shard.segments - 1}),)}).save(
        tmp_path
    )
    [count] = find_problems([TokenDataset(tmp_path)], sample=0.0)
    assert_error(count, DataError, shard.segments, shard.segments - 1, location=seg)


@pytest.mark.parametrize("suffix", ["bin", "idx", "seg"])
def test_verify_of_a_file_cut_short_since_it_was_opened_is_a_problem_of_its_shard(folder: Path, suffix: str) -> None:
    dataset = TokenDataset(folder)
    path = folder / f"part-00000.{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    flip(folder / "part-00002.bin", 0)
    first, second = find_problems([dataset])
    assert_error(first, DataError, path.stat().st_size, location=path)
    assert_error(second, DataError, "SHA-256", location="part-00002.bin")


def test_verify_of_a_file_that_cannot_be_read_is_a_problem_of_its_shard(folder: Path) -> None:
    dataset = TokenDataset(folder)
    (folder / "part-00000.bin").unlink()
    [found] = find_problems([dataset])
    assert_error(found, DataError, location="part-00000.bin")


def test_verify_stops_when_its_results_are_no_longer_needed(folder: Path) -> None:
    flip(folder / "part-00000.bin", 0)
    found = find_problems([TokenDataset(folder)], workers=2)
    next(found)
    found.close()


def test_hashed_file_that_ends_early_is_damage_with_its_location(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"12345")
    with verify._HashedFile(path) as file:
        assert file.read(3).tobytes() == b"123"
        with raises(DataError, 5, location=path):
            file.read(3)
