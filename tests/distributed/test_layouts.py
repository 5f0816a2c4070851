"""Layouts of four and eight ranks against one process: each axis, each pair of axes, and further model options.

`make test-parallel` runs every layout; docs/parallelism.md has what it measured, and layouts.py the tolerances.
"""

import pytest

from tests.helpers.layouts import (
    STEPS,
    Layout,
    Outcome,
    Placed,
    allowed,
    difference,
    reference,
    run_placed,
    train_layouts,
)
from tests.helpers.tiers import selected, slow

FAST_STEPS = 4
OF_TWO = [
    Layout("bipe_alibi", pipeline=2, zero=0, recompute="full", clip=0.0),
    Layout(tensor=2, zero=3, sequence=True),
    Layout("alibi", tensor=2, zero=0, model="zero_last_row: true, num_kv_heads: 1"),
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
    Layout(tensor=4, sequence=True, model="zero_last_row: true, num_kv_heads: 2"),
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
FAST = [Placed(num_ranks, layout) for num_ranks, layouts in ((2, OF_TWO), (4, OF_FOUR)) for layout in layouts]
SLOW = [
    Placed(num_ranks, layout) for num_ranks, layouts in ((4, SLOW_OF_FOUR), (8, SLOW_OF_EIGHT)) for layout in layouts
]
PLACED = [*FAST, *slow(SLOW)]
PADDED = [
    *(placed for placed in FAST if "zero_last_row" in placed.layout.model),
    *slow(placed for placed in SLOW if "zero_last_row" in placed.layout.model),
]
Found = dict[Placed, tuple[list[Outcome], Outcome]]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Return the results of each selected layout on all ranks, and that of one process."""
    folder, chosen, results = tmp_path_factory.mktemp("layouts"), selected(request, "placed"), {}
    for name, tier, steps in (("fast", FAST, FAST_STEPS), ("slow", SLOW, STEPS)):
        placed = {each: Placed(1, reference(each.layout)) for each in chosen if each in tier}
        ranks = run_placed(train_layouts, {*placed, *placed.values()}, folder / name, steps=steps)
        results |= {each: (ranks[each], ranks[single][0]) for each, single in placed.items()}
    return results


@pytest.mark.parametrize("placed", PLACED, ids=str)
def test_layout_gives_losses_norms_and_weights_of_one_process(found: Found, placed: Placed) -> None:
    ranks, expected = found[placed]
    assert expected.losses[-1] < expected.losses[0] - 0.1  # it learns something
    assert not placed.layout.clip or min(expected.norms) > placed.layout.clip  # in every step
    limits = allowed(placed.layout, placed.ranks)
    assert difference(ranks, expected).within(limits), (difference(ranks, expected), limits)


@pytest.mark.parametrize("placed", PLACED, ids=str)
def test_layout_gives_the_held_out_losses_by_position_of_one_process(found: Found, placed: Placed) -> None:
    ranks, expected = found[placed]
    known = [nats for nats in expected.by_position if nats == nats]
    assert len(expected.by_position) == 32 and len(known) == 24  # of the longer sequences, half have no weight
    assert max(known) - min(known) > 0.1
    error = 10 * allowed(placed.layout, placed.ranks).loss  # a part has a few tokens, whose errors do not cancel
    for found_here in ranks:
        assert found_here.by_position == pytest.approx(expected.by_position, rel=error, abs=0, nan_ok=True)


@pytest.mark.parametrize("placed", PADDED, ids=str)
def test_layout_padding_row_stays_zero(found: Found, placed: Placed) -> None:
    weights = found[placed][0][0].weights
    assert weights is not None
    for name in ("0.token.weight", *(["0.intra.weight"] if "0.intra.weight" in weights else [])):
        assert not weights[name][-1].any()
        assert weights[name][-2].any()
