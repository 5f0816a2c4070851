"""Layouts of four ranks against one process.

Measured in fp32 over 8 steps (largest over the layouts here): losses differ by 4.3e-7 relative, gradient norms by
4.7e-6; with stages alone losses are the same bits.
"""

import pytest
import torch

from tests.dist.launch import run_ranks
from tests.dist.layouts import Layout, Outcome, train_layouts

LOSS_TOLERANCE, NORM_TOLERANCE = 2e-6, 2e-5  # relative
WEIGHT_TOLERANCE = 5e-5  # absolute: Adam divides small gradients by their own size
LAYOUTS = [
    Layout(pipeline=4, zero=0),
    Layout("bipe_alibi", pipeline=2, recompute="selective"),
    Layout("alibi", tensor=2, pipeline=2, zero=0),
    Layout("bipe_alibi", tensor=2, pipeline=2, sequence=True, recompute="full"),
    Layout("rope", tensor=2, zero=2),
    Layout(tensor=4, zero=0, sequence=True),
    Layout(tensor=2, zero=3, sequence=True),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Layout, Outcome], list[dict[Layout, Outcome]]]:
    """Of one process by encoding, and of every rank of four."""
    folder = tmp_path_factory.mktemp("layouts")
    single = [Layout(encoding) for encoding in dict.fromkeys(layout.encoding for layout in LAYOUTS)]
    (alone,) = run_ranks(train_layouts, 1, folder / "1", layouts=single, work_dir=str(folder))
    return alone, run_ranks(train_layouts, 4, folder / "4", layouts=LAYOUTS, work_dir=str(folder))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_gives_losses_and_gradient_norms_of_one_process(
    outcomes: tuple[dict[Layout, Outcome], list[dict[Layout, Outcome]]], layout: Layout
) -> None:
    alone, ranks = outcomes
    expected = alone[Layout(layout.encoding)]
    assert expected.losses[-1] < expected.losses[0] - 0.1  # it learns something
    for found in (rank[layout] for rank in ranks):
        assert found.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
        assert found.norms == pytest.approx(expected.norms, rel=NORM_TOLERANCE)
        assert found.held_out == pytest.approx(expected.held_out, rel=LOSS_TOLERANCE)
    if layout.pipeline == 4:
        assert ranks[0][layout].losses == expected.losses


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_checkpoint_holds_the_weights_of_one_process(
    outcomes: tuple[dict[Layout, Outcome], list[dict[Layout, Outcome]]], layout: Layout
) -> None:
    alone, ranks = outcomes
    expected, found = alone[Layout(layout.encoding)].weights, ranks[0][layout].weights
    assert expected is not None and found is not None
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=WEIGHT_TOLERANCE, msg=name)
