"""Layouts of four and eight ranks against one process: each axis, each pair of axes, and what models may have besides.

`make test-parallel` runs every layout; docs/parallelism.md has what it measured, and layouts.py the tolerances.
"""

import pytest

from tests.helpers.layouts import Layout, Outcome, allowed, difference, reference, train_layouts
from tests.helpers.ranks import run_ranks
from tests.helpers.tiers import selected, slow

MICRO = 4  # sequences in a micro-batch
OF_FOUR = [
    Layout(pipeline=4, clip=0.0),
    Layout("bipe_alibi", tensor=2, pipeline=2, sequence=True, recompute="full"),
    Layout(tensor=2, zero=3, sequence=True),
    Layout(tensor=4, sequence=True, model="zero_last_row: true"),
    Layout(pipeline=2, model="num_kv_heads: 1, zero_last_row: true"),
    Layout(tensor=2, pipeline=2, sequence=True, precision="bf16"),
    Layout("rope", context=2, tensor=2, sequence=True, zero=2, recompute="full"),
]
SLOW_OF_FOUR = [
    Layout(pipeline=4, zero=0),
    Layout("bipe_alibi", pipeline=2, recompute="selective"),
    Layout("alibi", tensor=2, pipeline=2, zero=0),
    Layout("rope", tensor=2, zero=2),
    Layout(tensor=4, zero=0, sequence=True),
    Layout("bipe_alibi", tensor=2, zero=2, sequence=True, model="num_kv_heads: 2"),
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
PLACED = [(4, layout._replace(micro=MICRO)) for layout in OF_FOUR]
SLOW = [(4, layout._replace(micro=MICRO)) for layout in SLOW_OF_FOUR] + [(8, layout) for layout in SLOW_OF_EIGHT]


@pytest.fixture(scope="module")
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[Layout, Outcome]]]:
    """What every rank of one, four and eight found."""
    folder, placed = tmp_path_factory.mktemp("layouts"), selected(request, "placed")
    layouts = {1: list({reference(layout) for _, layout in placed})}
    for num_ranks, layout in placed:
        layouts.setdefault(num_ranks, []).append(layout)
    return {
        num_ranks: run_ranks(train_layouts, num_ranks, folder / str(num_ranks), layouts=chosen, work_dir=str(folder))
        for num_ranks, chosen in layouts.items()
    }


@pytest.mark.parametrize("placed", [*PLACED, *slow(SLOW)], ids=str)
def test_layout_gives_losses_norms_and_weights_of_one_process(
    ranks: dict[int, list[dict[Layout, Outcome]]], placed: tuple[int, Layout]
) -> None:
    num_ranks, layout = placed
    expected = ranks[1][0][reference(layout)]
    assert expected.losses[-1] < expected.losses[0] - 0.1  # it learns something
    assert not layout.clip or min(expected.norms) > layout.clip  # in every step
    limits, found = allowed(layout, num_ranks), difference([rank[layout] for rank in ranks[num_ranks]], expected)
    assert found.within(limits), (found, limits)


@pytest.mark.parametrize("placed", [placed for placed in PLACED if "zero_last_row" in placed[1].model], ids=str)
def test_layout_padding_row_stays_zero(
    ranks: dict[int, list[dict[Layout, Outcome]]], placed: tuple[int, Layout]
) -> None:
    num_ranks, layout = placed
    weights = ranks[num_ranks][0][layout].weights
    assert weights is not None
    for name in ("0.token.weight", "0.intra.weight"):
        assert not weights[name][-1].any()
        assert weights[name][-2].any()
