"""Counts of segments, sequences and documents, complete and in samples, against a plain recount."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspection import stats
from megatron_bipe.data.inspection.stats import Distribution, Statistics, count_dataset
from megatron_bipe.data.inspection.stats_text import (
    as_json,
    datasets_table,
    distribution_tables,
    draw_stats,
    stats_table,
)
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.errors import DataError
from megatron_bipe.picture import save_figure
from tests.helpers.errors import raises

TEXTS = [["a cat\nsat.\n", "x\n\ny"], [], ["\u4e16\x1bz q\n", ""]]
SEPARATOR = 5
Write = Callable[..., Manifest]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks and sequences so small that small datasets have several of them."""
    monkeypatch.setattr(stats, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(stats, "SEQ_LEN_TOKENS", 16)


def random_shards(seed: int, shards: int = 4) -> list[list[list[int]]]:
    generator = np.random.default_rng(seed)
    lengths = [generator.integers(0, 120, generator.integers(0, 9)) for _ in range(shards)]
    return [[generator.choice([SEPARATOR, 7, 8, 9, 10, 11], size).tolist() for size in sizes] for sizes in lengths]


def recount(shards: list[list[list[int]]], window: int) -> tuple[Counter[int], Counter[int], Counter[int]]:
    """Return segment lengths, segments per sequence and document lengths, counted token by token."""
    segments, sequences, documents = Counter[int](), Counter[int](), Counter[int]()
    for shard in shards:
        documents.update(map(len, shard))
        tokens = [token for document in shard for token in document]
        length = 0
        for token in tokens:
            length += 1
            if token == SEPARATOR:
                segments[length] += 1
                length = 0
        starts = range(0, len(tokens) - window + 1, window)
        sequences.update(tokens[start : start + window].count(SEPARATOR) for start in starts)
    return segments, sequences, documents


def as_counter(distribution: Distribution) -> Counter[int]:
    return Counter(dict(zip(distribution.values_V.tolist(), distribution.counts_V.tolist(), strict=True)))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(6))
def test_count_dataset_of_all_equals_a_plain_recount(write_dataset: Write, tmp_path: Path, seed: int) -> None:
    shards = random_shards(seed)
    write_dataset(tmp_path, shards)
    dataset = TokenDataset(tmp_path)
    seen: list[int] = []
    found = count_dataset(dataset, None, workers=2, advance=seen.append)
    segments, sequences, documents = recount(shards, window=16)
    assert as_counter(found.segment_tokens) == segments
    assert as_counter(found.segments_per_sequence) == sequences
    assert as_counter(found.document_tokens) == documents
    assert found.tokens == sum(seen) == dataset.num_tokens
    assert found.segment_tokens.count == dataset.manifest.num_segments


@pytest.mark.usefixtures("small")
def test_count_dataset_of_a_segment_over_several_blocks_has_its_full_length(
    write_dataset: Write, tmp_path: Path
) -> None:
    write_dataset(tmp_path, [[[7] * 200, [7] * 99 + [SEPARATOR], [7] * 30]])
    found = count_dataset(TokenDataset(tmp_path), None)
    assert as_counter(found.segment_tokens) == {300: 1}


@pytest.mark.usefixtures("small")
def test_count_dataset_of_a_sample_reads_evenly_spread_blocks_and_no_cut_segments(
    write_dataset: Write, tmp_path: Path
) -> None:
    shard = ([7] * 9 + [SEPARATOR]) * 64  # 640 tokens, 10 blocks
    write_dataset(tmp_path, [[shard[start : start + 64] for start in range(0, 640, 64)]] * 3)
    dataset = TokenDataset(tmp_path)
    found = count_dataset(dataset, 320)
    assert found.tokens == 5 * 64  # every sixth of 30 blocks
    assert set(as_counter(found.segment_tokens)) == {10}  # a cut one would be shorter
    assert as_counter(found.document_tokens) == {64: 5}
    assert found.segments_per_sequence.count == 5 * 4
    assert as_counter(count_dataset(dataset, 320, workers=3).segment_tokens) == as_counter(found.segment_tokens)
    assert count_dataset(dataset, 1).tokens == 64  # at least a block


def test_count_dataset_of_documents_without_tokens_counts_them(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, [[[], []], []])
    found = count_dataset(TokenDataset(tmp_path))
    assert as_counter(found.document_tokens) == {0: 2}
    assert found.tokens == found.segment_tokens.count == found.segments_per_sequence.count == 0


def test_count_dataset_of_a_negative_document_length_names_its_location(write_dataset: Write, tmp_path: Path) -> None:
    write_dataset(tmp_path, [[[1, 5], [1], [2]]])
    index = tmp_path / "part-00000.idx"
    content = bytearray(index.read_bytes())
    content[34 + 4 + 3] ^= 0x80
    index.write_bytes(content)
    with raises(DataError, "sequence lengths", 1, 38, location=index):
        count_dataset(TokenDataset(tmp_path))


@given(st.lists(st.lists(st.integers(0, 1 << 33), max_size=30), max_size=5))
def test_distribution_of_parts_equals_that_of_all_and_numpys(parts: list[list[int]]) -> None:
    merged = Distribution.merge([Distribution.of(np.array(part, dtype=np.int64)) for part in parts])
    numbers = sorted(number for part in parts for number in part)
    assert as_counter(merged) == Counter(numbers)
    assert merged.count == len(numbers)
    expected_bins: Counter[int] = Counter((1 << number.bit_length()) >> 1 for number in numbers)
    assert {low: count for low, count in merged.bins().items() if count} == expected_bins
    if numbers:
        assert merged.mean == pytest.approx(np.mean(numbers))
        assert merged.maximum == numbers[-1]
        for share in (0.5, 0.95, 1.0):
            assert merged.quantile(share) == np.quantile(numbers, share, method="inverted_cdf")
        above = [number for number in numbers if number > 1024]
        assert merged.share_above(1024) == pytest.approx(len(above) / len(numbers))
        assert merged.sum_share_above(1024) == pytest.approx(sum(above) / max(sum(numbers), 1))


@pytest.fixture
def folder(write_text_dataset: Write, tmp_path: Path) -> Path:
    write_text_dataset(tmp_path, TEXTS)
    return tmp_path


def test_stats_counts_and_means_are_those_of_the_documents(folder: Path) -> None:
    lines = stats_table(Manifest.load(folder)).splitlines()
    assert lines[1] == "segments   newline: 1 token ids (13)"
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("part", "all"))}
    assert rows["part-00000"] == ["2", "17", "4", "51", "4.25", "240.94"]
    assert rows["part-00001"] == ["0", "0", "0", "0", "-", "-"]
    assert rows["all"][:3] == ["4", "25", "5"]
    assert len({len(line) for line in lines[4:]}) == 1  # a table


def test_datasets_table_has_one_line_per_dataset_and_their_sums(folder: Path) -> None:
    manifest = Manifest.load(folder)
    lines = datasets_table({"one": manifest, "two": manifest}).splitlines()
    assert len([line for line in lines if line.startswith(("tokenizer", "segments "))]) == 2  # both are equal
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert rows["one"] == rows["two"] == ["4", "25", "5", "75", "5.00", "204.80"]
    assert rows["all"] == ["8", "50", "10", "150", "5.00", "204.80"]


def counted(write_dataset: Write, folder: Path, lengths: list[int]) -> tuple[Manifest, Statistics]:
    write_dataset(folder, [[[7] * (length - 1) + [SEPARATOR] for length in lengths]])
    dataset = TokenDataset(folder)
    return dataset.manifest, count_dataset(dataset)


def test_distribution_tables_have_one_row_per_dataset_and_the_clipped_share(
    write_dataset: Write, tmp_path: Path
) -> None:
    found = {
        "x": counted(write_dataset, tmp_path / "x", [2] * 9 + [1024] * 9 + [1025, 2049]),
        "none": counted(write_dataset, tmp_path / "none", []),
    }
    text = distribution_tables(found)
    rows = [line.split() for line in text.splitlines() if line.startswith("x ")]
    assert rows[0] == ["x", "20", "615.40", "1,024", "1,025", "2,049"]
    assert rows[1] == ["x", "45.0%", *["-"] * 8, "50.0%", "5.0%"]
    assert ["x", "10.000%", "24.976%"] in rows
    assert ["none", "0", "-", "-", "-", "-"] in [line.split() for line in text.splitlines()]
    assert "x: counted 12,308 of 12,308 tokens." in text


def test_distribution_tables_of_fixed_segments_note_that_training_counts_differently(
    write_dataset: Write, tmp_path: Path
) -> None:
    write_dataset(tmp_path, [[[7] * 40]], rule=SegmentRule(spec="fixed:16", token_ids=()))
    dataset = TokenDataset(tmp_path)
    assert "each segment has 16 tokens there" in distribution_tables({"x": (dataset.manifest, count_dataset(dataset))})


def test_as_json_is_strict_json_even_of_nothing(write_dataset: Write, tmp_path: Path) -> None:
    content = as_json(*counted(write_dataset, tmp_path / "none", []))
    assert json.loads(json.dumps(content, allow_nan=False))["segment_tokens"]["mean"] is None
    content = as_json(*counted(write_dataset, tmp_path / "some", [3, 3, 1025]))
    assert content["segment_tokens"]["bins"]["2"] == 2
    assert content["segment_tokens"]["share_over_1024"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("count", [1, 14])
def test_draw_stats_of_any_number_of_datasets_is_a_png_and_always_the_same(
    write_dataset: Write, tmp_path: Path, count: int
) -> None:
    _, statistics = counted(write_dataset, tmp_path / "x", [2, 3, 5, 4000])
    found = {f"d{number}": statistics for number in range(count)}
    figure = draw_stats(found)
    picture = save_figure(figure, "png")
    assert picture.startswith(b"\x89PNG") and picture == save_figure(draw_stats(found), "png")
    ticks = [[label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes]
    assert ticks[0] == ["2", "8", "32", "128", "512", "2,048"]
    assert [len(legend.get_texts()) for legend in figure.legends] == ([count] if count > 1 else [])


def test_draw_stats_of_nothing_counted_is_a_png(write_dataset: Write, tmp_path: Path) -> None:
    _, statistics = counted(write_dataset, tmp_path / "x", [])
    assert save_figure(draw_stats({"x": statistics}), "png").startswith(b"\x89PNG")
