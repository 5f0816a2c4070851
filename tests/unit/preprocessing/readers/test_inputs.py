"""Inputs: which are found, and how they are cut into ranges."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bipe.errors import DataError
from preprocessing.readers.inputs import KINDS, LEAST_RANGE_TEXT_BYTES, RANGES, Input, find_inputs, plan_ranges


def test_find_inputs_globs_folders_and_files_keep_the_order_given(inputs: dict[str, Path]) -> None:
    folder = inputs["jsonl"].parent
    (folder / "notes.md").write_text("not an input")
    found = find_inputs([str(inputs["gz"]), str(folder / "*.jsonl*"), str(folder)])
    names = [str(Path(item.name).relative_to(folder)) for item in found]
    assert names == ["c.jsonl.gz", "a.jsonl", "b.jsonl.zst", *(f"d/{n}.txt" for n in range(5))]


@pytest.mark.parametrize("name", ["gone.jsonl", "*.jsonl", "empty", "notes.md"])
def test_find_inputs_nothing_usable_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"\.jsonl\.zst"):
        find_inputs([str(tmp_path / name)])


@given(
    sizes=st.lists(st.tuples(st.integers(0, 10**11), st.sampled_from([".jsonl", ".jsonl.zst", ".txt"])), max_size=8),
    shard_tokens=st.integers(1, 10**10),
)
def test_plan_ranges_covers_every_byte_once_and_in_order(sizes: list[tuple[int, str]], shard_tokens: int) -> None:
    inputs = [Input(f"{n}{suffix}", KINDS[suffix], size, "") for n, (size, suffix) in enumerate(sizes)]
    at = dict.fromkeys(inputs, 0)
    order = []
    for pieces in plan_ranges(inputs, max(shard_tokens, 10**7)):
        assert pieces
        for piece in pieces:
            assert piece.start == at[piece.input]
            at[piece.input] = piece.stop
            order.append(inputs.index(piece.input))
            if not piece.input.kind.is_divisible:
                assert (piece.start, piece.stop) == (0, piece.input.size)
    assert order == sorted(order)
    assert at == {item: item.size for item in inputs}


def test_plan_ranges_gather_small_files_and_cut_large_ones_to_like_sizes() -> None:
    small = [Input(f"{n}.txt", KINDS[".txt"], 1000, "") for n in range(50_000)]
    large = Input("large.jsonl", KINDS[".jsonl"], 10**9, "")
    ranges = plan_ranges([*small, large], 1 << 30)
    sizes = [sum(piece.stop - piece.start for piece in pieces) for pieces in ranges]
    assert len(ranges) <= RANGES
    assert max(sizes) <= LEAST_RANGE_TEXT_BYTES
    assert sorted(sizes)[1] > LEAST_RANGE_TEXT_BYTES / 2  # all but the last of the small files
    one_a_shard = plan_ranges([large], 500_000)
    assert max(piece.stop - piece.start for (piece,) in one_a_shard) <= 4 * 500_000
