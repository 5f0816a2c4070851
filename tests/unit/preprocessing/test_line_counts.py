"""Counts over the ranges: line numbers of complete files, limits, and pieces that must fit together."""

import pytest

from megatron_bipe.errors import DataError
from preprocessing.line_counts import sum_ranges
from preprocessing.readers.documents import PieceEnd
from preprocessing.readers.inputs import KINDS, Input, Piece
from preprocessing.readers.parse import Malformed
from preprocessing.work_dir import RangeRecord
from tests.helpers.errors import raises

FILE = Input("f.jsonl", KINDS[".jsonl"], 400, "")
OTHER = Input("g.jsonl", KINDS[".jsonl"], 100, "")
QUARTERS = [Piece(FILE, start, start + 100) for start in range(0, 400, 100)]


def record(*ends: PieceEnd, lines: int = 100, malformed: tuple[tuple[int, int], ...] = ()) -> RangeRecord:
    """Return the record of a range of these pieces; `malformed` are pairs of a piece and a line."""
    return RangeRecord(
        shards=(),
        ends=ends,
        lines=lines,
        documents=lines - len(malformed),
        empty=1,
        duplicates=0,
        malformed=len(malformed),
        backend="stock",
        first_malformed=tuple(Malformed("f.jsonl, from byte 7", line, "bad") for _, line in malformed)[:10],
        malformed_pieces=tuple(piece for piece, _ in malformed)[:10],
    )


def fits(*ends: tuple[int, int, int]) -> bool:
    """Return True if pieces of one file that end like this fit together, one range each."""
    try:
        sum_ranges([record(PieceEnd(*end)) for end in ends], [[piece] for piece in QUARTERS], None)
    except DataError as error:
        return not ("do not fit together" in error.message and "'unfinished'" in error.remedy)
    return True


def test_sum_ranges_accepts_pieces_that_skip_the_overrun_of_the_previous() -> None:
    assert fits((3, 0, 5), (2, 5, 0), (2, 0, 9), (1, 9, 0))
    assert fits((3, 0, 250), (0, 100, 0), (0, 100, 0), (1, 50, 0))  # one line over three pieces
    assert fits((3, 0, 300), (0, 100, 0), (0, 100, 0), (0, 100, 0))


@pytest.mark.parametrize(
    "ends",
    [
        ((3, 0, 5), (2, 4, 0), (2, 0, 0), (1, 0, 0)),
        ((3, 0, 5), (2, 6, 0), (2, 0, 0), (1, 0, 0)),
        ((3, 0, 5), (2, 0, 0), (2, 5, 0), (1, 0, 0)),
        ((3, 0, 0), (2, 5, 0), (2, 0, 0), (1, 0, 0)),
        ((3, 0, 5), (0, 0, 7), (2, 12, 0), (1, 0, 0)),
        ((3, 0, 5), (0, 0, 0), (0, 0, 0), (0, 0, 0)),  # no piece skipped it
        ((3, 0, 0), (2, 0, 0), (2, 0, 5), (0, 4, 0)),
    ],
)
def test_sum_ranges_pieces_that_disagree_are_refused(ends: tuple[tuple[int, int, int], ...]) -> None:
    assert not fits(*ends)


def test_sum_ranges_malformed_lines_are_counted_from_the_start_of_their_file() -> None:
    ranges = [[QUARTERS[0]], [QUARTERS[1], QUARTERS[2]], [QUARTERS[3], Piece(OTHER, 0, 100)]]
    end = PieceEnd(10, 0, 0)
    records = [
        record(end, malformed=((0, 3),)),
        record(end, end, malformed=((0, 3), (1, 3))),
        record(end, end, malformed=((0, 4), (1, 5))),
    ]
    counts = sum_ranges(records, ranges, None)
    named = [(bad.file, bad.line) for bad in counts.first_malformed]
    assert named == [("f.jsonl", 3), ("f.jsonl", 13), ("f.jsonl", 23), ("f.jsonl", 34), ("g.jsonl", 5)]
    assert (counts.num_lines, counts.num_documents, counts.num_empty, counts.num_malformed) == (300, 295, 3, 5)


@pytest.mark.parametrize("max_malformed", [None, 10, 11])
def test_sum_ranges_range_with_too_many_malformed_lines_is_refused_again(max_malformed: int | None) -> None:
    ranges = [[QUARTERS[0]], [QUARTERS[1]]]
    records = [record(PieceEnd(9, 0, 0), lines=10**6), record(PieceEnd(9, 0, 0), malformed=((0, 1),) * 11)]
    if max_malformed == 11:
        assert sum_ranges(records, ranges, max_malformed).num_malformed == 11
        return
    with raises(
        DataError, 11, 100 if max_malformed is None else 1000100, 10, location="f.jsonl", remedy="--max-malformed"
    ):
        sum_ranges(records, ranges, max_malformed)


def test_sum_ranges_first_malformed_lines_of_all_are_named(caplog: pytest.LogCaptureFixture) -> None:
    records = [record(PieceEnd(9, 0, 0), malformed=tuple((0, line) for line in range(1, 8))) for _ in QUARTERS]
    counts = sum_ranges(records, [[piece] for piece in QUARTERS], 100)
    assert [bad.line for bad in counts.first_malformed] == [1, 2, 3, 4, 5, 6, 7, 10, 11, 12]
    assert caplog.text.count("Skipped") == 10
    assert counts.num_malformed == 28
