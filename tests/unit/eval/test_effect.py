"""When the effect of the paper counts as shown, against figures that lie on either side of each bound."""

import math

import pytest

from megatron_bipe.eval.effect import extrapolation_effect

# Rises at twice and four times the training length that just suffice; exact in binary, as are all sums below.
ROPE, BIPE_ROPE, BIPE_ALIBI = (0.375, 0.625), (0.125, 0.5), (0.0, 0.0)
LITTLE = 2**-20


def effect(rope=ROPE, bipe_rope=BIPE_ROPE, bipe_alibi=BIPE_ALIBI):
    rises = {"rope": rope, "bipe_rope": bipe_rope, "bipe_alibi": bipe_alibi}
    nats = {name: {64: 3.0, 128: 3.0 + twice, 192: 99.0, 256: 3.0 + four} for name, (twice, four) in rises.items()}
    found = extrapolation_effect(nats, 64)
    assert found.rises_nats == rises
    return found


def test_effect_at_its_bounds_shows():
    found = effect()
    assert found.ratios == (3.0, 1.25)
    assert found.rope_breaks == (True, True) and found.alibi_holds and found.shows


@pytest.mark.parametrize(
    ("changes", "breaks", "holds"),
    [
        ({"rope": (0.375 - LITTLE, 0.625)}, (False, True), True),
        ({"rope": (0.375, 0.625 - LITTLE)}, (True, False), True),
        ({"bipe_rope": (0.125 + LITTLE, 0.5)}, (False, True), True),
        ({"bipe_alibi": (LITTLE, -1.0)}, (True, True), False),
        ({"bipe_alibi": (-1.0, LITTLE)}, (True, True), False),
        ({"rope": (0.0, 0.625), "bipe_rope": (-0.5, 0.5)}, (False, True), True),
        ({"rope": (-0.25, 0.625), "bipe_rope": (-0.5, 0.5)}, (False, True), True),
    ],
)
def test_effect_beyond_one_bound_does_not_show(changes, breaks, holds):
    found = effect(**changes)
    assert (found.rope_breaks, found.alibi_holds, found.shows) == (breaks, holds, False)


def test_effect_where_bipe_rope_falls_is_beyond_any_ratio():
    found = effect(rope=(LITTLE, LITTLE), bipe_rope=(-0.5, 0.0))
    assert found.ratios == (math.inf, math.inf) and found.shows


def test_effect_of_missing_length_or_encoding_is_no_verdict():
    nats = {"rope": {64: 3.0, 128: 3.1}, "bipe_rope": {64: 3.0, 128: 3.0, 256: 3.0}}
    with pytest.raises(KeyError):
        extrapolation_effect(nats, 64)
    with pytest.raises(KeyError):
        _ = extrapolation_effect({"rope": {64: 3.0, 128: 3.1, 256: 3.1}}, 64).shows
