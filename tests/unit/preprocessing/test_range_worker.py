"""The counts in the record of a range."""

from preprocessing.range_worker import _Counts
from preprocessing.readers.documents import PieceEnd
from preprocessing.readers.parse import Malformed, Parsed


def test_counts_name_the_first_malformed_lines_and_their_pieces_and_count_the_rest() -> None:
    counts = _Counts()
    for piece in range(3):
        malformed = [Malformed("f.jsonl", line, "bad") for line in range(1, 8)]
        counts.add(Parsed([], malformed, num_lines=9, num_empty=2, read_bytes=1), piece)
        counts.ends.append(PieceEnd(9, 0, 0))
    record = counts.record([], "stock")
    assert [bad.line for bad in record.first_malformed] == [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert record.malformed_pieces == (0,) * 7 + (1,) * 3
    assert (record.lines, record.empty, record.malformed, record.documents) == (27, 6, 21, 0)
