"""Layouts of four and eight ranks against one process: each axis, each pair of axes, and what models may have besides.

`make test-parallel` runs every layout; docs/parallelism.md has what it measured, and layouts.py the tolerances.
"""

import pytest

from tests.helpers.layouts import STEPS, Layout, Outcome, allowed, difference, reference, train_layouts
from tests.helpers.ranks import run_ranks
from tests.helpers.tiers import selected, slow

FAST_STEPS, MICRO = 4, 4  # updates, and sequences in a micro-batch
OF_TWO = [
    Layout("bipe_alibi", pipeline=2, zero=0, recompute="full", clip=0.0),
    Layout(tensor=2, zero=3, sequence=True),
    Layout("alibi", tensor=2, zero=0, model="zero_last_row: true, num_kv_heads: 2"),
    Layout("rope", context=2, zero=2, recompute="selective"),
]
OF_FOUR = [
    Layout("bipe_alibi", tensor=2, pipeline=2, sequence=True, recompute="full"),
    Layout("rope", context=2, tensor=2, sequence=True, zero=2, recompute="full"),
]
SLOW_OF_FOUR = [
    Layout(pipeline=4, zero=0),
    Layout(pipeline=4, clip=0.0),
    Layout("bipe_alibi", pipeline=2, recompute="selective"),
    Layout("alibi", tensor=2, pipeline=2, zero=0),
    Layout("rope", tensor=2, zero=2),
    Layout(tensor=4, zero=0, sequence=True),
    Layout(tensor=2, zero=3, sequence=True),
    Layout("bipe_alibi", tensor=2, zero=2, sequence=True, model="num_kv_heads: 2"),
    Layout(tensor=4, sequence=True, model="zero_last_row: true"),
    Layout(pipeline=2, model="num_kv_heads: 1, zero_last_row: true"),
    Layout(tensor=2, pipeline=2, sequence=True, precision="bf16"),
    Layout("bipe_alibi", tensor=2, zero=3, precision="bf16"),
    Layout(context=2, zero=0),
    Layout("bipe_alibi", context=4, zero=3),
    Layout("alibi", context=2, pipeline=2, recompute="selective"),
    Layout("bipe_alibi", context=2, precision="bf16", model="num_kv_heads: 2, log_scale: true"),
]
SLOW_OF_EIGHT = [
    Layout(tensor=2, pipeline=2, sequence=True, recompute="selective"),
    Layout(tensor=2, context=2, pipeline=2, sequence=True),
]
FAST = [(n, layout._replace(micro=MICRO)) for n, layouts in ((2, OF_TWO), (4, OF_FOUR)) for layout in layouts]
SLOW = [(n, layout) for n, layouts in ((4, SLOW_OF_FOUR), (8, SLOW_OF_EIGHT)) for layout in layouts]
PLACED = [*FAST, *slow(SLOW)]
PADDED = [
    *(placed for placed in FAST if "zero_last_row" in placed[1].model),
    *slow(placed for placed in SLOW if "zero_last_row" in placed[1].model),
]


Placed = tuple[int, Layout]  # on so many ranks
Found = dict[Placed, tuple[list[Outcome], Outcome]]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Outcomes of each selected layout on all ranks, and that of one process; one launch for each number of ranks."""
    folder, ranks = tmp_path_factory.mktemp("layouts"), {}
    chosen = selected(request, "placed")
    for name, tier, steps in (("fast", FAST, FAST_STEPS), ("slow", SLOW, STEPS)):
        by_ranks: dict[int, list[Layout]] = {}
        for num_ranks, layout in (placed for placed in chosen if placed in tier):
            by_ranks.setdefault(num_ranks, []).append(layout)
            if reference(layout) not in by_ranks.setdefault(1, []):
                by_ranks[1].append(reference(layout))
        for num_ranks, layouts in by_ranks.items():
            work_dir = folder / f"{name}-{num_ranks}"
            ranks[name, num_ranks] = run_ranks(
                train_layouts, num_ranks, work_dir, layouts=layouts, work_dir=str(work_dir), steps=steps
            )
    return {
        (num_ranks, layout): (
            [rank[layout] for rank in ranks[name, num_ranks]],
            ranks[name, 1][0][reference(layout)],
        )
        for name, tier in (("fast", FAST), ("slow", SLOW))
        for num_ranks, layout in tier
        if (num_ranks, layout) in chosen
    }


@pytest.mark.parametrize("placed", PLACED, ids=str)
def test_layout_gives_losses_norms_and_weights_of_one_process(found: Found, placed: Placed) -> None:
    num_ranks, layout = placed
    ranks, expected = found[placed]
    assert expected.losses[-1] < expected.losses[0] - 0.1  # it learns something
    assert not layout.clip or min(expected.norms) > layout.clip  # in every step
    limits = allowed(layout, num_ranks)
    assert difference(ranks, expected).within(limits), (difference(ranks, expected), limits)


@pytest.mark.parametrize("placed", PADDED, ids=str)
def test_layout_padding_row_stays_zero(found: Found, placed: Placed) -> None:
    weights = found[placed][0][0].weights
    assert weights is not None
    for name in ("0.token.weight", *(["0.intra.weight"] if "0.intra.weight" in weights else [])):
        assert not weights[name][-1].any()
        assert weights[name][-2].any()
