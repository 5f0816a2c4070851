"""Losses that runs wrote, and whether they show the paper's effect, with values on either side of each bound."""

import math

import pytest

from megatron_bipe.errors import DataError
from megatron_bipe.eval.quickstart_page import loss_lines
from megatron_bipe.eval.quickstart_results import average_steps, extrapolation_effect, read_losses, verdict
from megatron_bipe.train.metrics_file import STEP_TIME, VALID_LOSS, MetricsFile
from tests.helpers.errors import raises


@pytest.fixture
def run_dir(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    for step in range(1, 7):
        loss = None if step == 2 else 6.0 - step / 2
        file.add({"step": step, "tokens": 100 * step, "loss/train_nats": loss, STEP_TIME: 0.5 if step > 1 else 2.5})
        if step % 3 == 0:
            file.add({"step": step, "tokens": 100 * step, VALID_LOSS: 5.0 - step / 3})
    file.close()
    return tmp_path


def test_read_losses_are_what_a_run_wrote(run_dir):
    losses = read_losses(run_dir)
    assert losses.train[0] == (100, 5.5) and math.isnan(losses.train[1][1])
    assert losses.valid == [(300, 4.0), (600, 3.0)]
    assert (losses.num_tokens, losses.step_s, losses.tokens_per_s) == (600, 0.5, 120.0)
    named, behind = loss_lines("m", losses, 2)
    assert (named.name, named.points) == ("m", losses.valid)
    assert (behind.name, len(behind.points)) == ("", 6)
    [alone] = loss_lines("m", losses._replace(valid=[]), 2)
    assert alone.name == "m"


def test_average_steps_keeps_the_mean():
    points = [(float(x), float(x * x)) for x in range(1, 8)]
    assert average_steps(points, 7) == points
    assert average_steps(points, 4) == [(1.5, 2.5), (3.5, 12.5), (5.5, 30.5), (7.0, 49.0)]


@pytest.mark.parametrize("damage", ['{"step": 7, "tok', "[1]", '{"step": 7}', '{"tokens": 1, "loss/train_nats": 1}'])
def test_read_losses_damaged_line_is_named(run_dir, damage):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(damage)
    with raises(DataError, "line 9", damage, location=run_dir / "metrics.jsonl"):
        read_losses(run_dir)


def test_read_losses_without_steps_or_file_says_so(tmp_path):
    with raises(DataError, "No such file", location=tmp_path / "metrics.jsonl"):
        read_losses(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with raises(DataError, "training step", location=tmp_path / "metrics.jsonl"):
        read_losses(tmp_path)


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


NATS = {128: 3.0, 256: 3.01, 512: 3.1}


@pytest.mark.parametrize(("rope_at_256", "shows"), [(3.2, True), (3.02, False)])
def test_verdict_says_by_how_much_losses_changed_and_whether_that_is_the_effect(rope_at_256, shows):
    falling = {128: 3.0, 256: 2.9, 512: 2.8}
    rope = NATS | {256: rope_at_256, 512: 3.9}
    text = verdict({"rope": rope, "bipe_rope": NATS, "bipe_alibi": falling}, 128)
    assert ("NOT" not in text) is shows
    assert f"{rope_at_256 - 3:+.3f}" in text and "+0.900" in text and "+0.010" in text and "-0.200" in text
