"""Layouts of four and eight ranks against one process: each axis, each pair of axes, and what models may have besides.

`make test-parallel` runs every layout; docs/parallelism.md has what it measured, and layouts.py the tolerances.
"""

import pytest

from tests.helpers.layouts import Difference, Layout, Outcome, allowed, difference, reference, train_layouts
from tests.helpers.ranks import run_ranks

OF_FOUR = [
    Layout(pipeline=4, zero=0),
    Layout(pipeline=4, clip=0.0),
    Layout("bipe_alibi", pipeline=2, recompute="selective"),
    Layout("alibi", tensor=2, pipeline=2, zero=0),
    Layout("bipe_alibi", tensor=2, pipeline=2, sequence=True, recompute="full"),
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
    Layout("rope", context=2, tensor=2, sequence=True, zero=2, recompute="full"),
    Layout("bipe_alibi", context=2, precision="bf16", model="num_kv_heads: 2, log_scale: true"),
]
OF_EIGHT = [
    Layout(tensor=2, pipeline=2, sequence=True, recompute="selective"),
    Layout(tensor=2, context=2, pipeline=2, sequence=True),
]
PLACED = [*((4, layout) for layout in OF_FOUR), *((8, layout) for layout in OF_EIGHT)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[Layout, Outcome]]]:
    """What every rank of one, four and eight found."""
    folder = tmp_path_factory.mktemp("layouts")
    single = list({reference(layout) for _, layout in PLACED})
    return {
        num_ranks: run_ranks(train_layouts, num_ranks, folder / str(num_ranks), layouts=layouts, work_dir=str(folder))
        for num_ranks, layouts in ((1, single), (4, OF_FOUR), (8, OF_EIGHT))
    }


def found(ranks: dict[int, list[dict[Layout, Outcome]]], num_ranks: int, layout: Layout) -> Difference:
    return difference([rank[layout] for rank in ranks[num_ranks]], ranks[1][0][reference(layout)])


@pytest.mark.parametrize(("num_ranks", "layout"), PLACED, ids=str)
def test_layout_gives_losses_norms_and_weights_of_one_process(
    ranks: dict[int, list[dict[Layout, Outcome]]], num_ranks: int, layout: Layout
) -> None:
    expected = ranks[1][0][reference(layout)]
    assert expected.losses[-1] < expected.losses[0] - 0.1  # it learns something
    assert not layout.clip or min(expected.norms) > layout.clip  # in every step
    limits = allowed(layout, num_ranks)
    assert found(ranks, num_ranks, layout).within(limits), (found(ranks, num_ranks, layout), limits)


def test_layout_padding_row_stays_zero(ranks: dict[int, list[dict[Layout, Outcome]]]) -> None:
    for layout in (layout for layout in OF_FOUR if "zero_last_row" in layout.model):
        weights = ranks[4][0][layout].weights
        assert weights is not None
        for name in ("0.token.weight", "0.intra.weight"):
            assert not weights[name][-1].any()
            assert weights[name][-2].any()
