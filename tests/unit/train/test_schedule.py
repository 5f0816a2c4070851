"""The learning rate against transformers' schedulers of the same names."""

import pytest
import torch
from transformers import (
    get_cosine_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from megatron_bipe.config import OptimizerConfig
from megatron_bipe.config.load import load_run_config
from megatron_bipe.train.schedule import first_changed_rate, learning_rate

STEPS, WARMUP, LR = 40, 10, 3e-4


def _theirs(make):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    scheduler = make(optimizer)
    rates = []
    for _ in range(STEPS + 5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_learning_rate_polynomial_equals_transformers(power):
    config = OptimizerConfig(lr=LR, min_lr=1e-5, warmup_steps=WARMUP, decay_power=power)
    theirs = _theirs(lambda o: get_polynomial_decay_schedule_with_warmup(o, WARMUP, STEPS, lr_end=1e-5, power=power))
    assert [learning_rate(config, STEPS, step) for step in range(STEPS + 5)] == pytest.approx(theirs, rel=1e-12)


def test_learning_rate_cosine_equals_transformers_down_to_its_end():
    config = OptimizerConfig(lr=LR, warmup_steps=WARMUP, decay="cosine")
    theirs = _theirs(lambda o: get_cosine_schedule_with_warmup(o, WARMUP, STEPS))[: STEPS + 1]
    ours = [learning_rate(config, STEPS, step) for step in range(STEPS + 1)]
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-18)


def test_learning_rate_decay_steps_end_the_decay_before_the_run():
    config = OptimizerConfig(lr=LR, min_lr=1e-5, warmup_steps=0, decay_steps=20)
    assert learning_rate(config, STEPS, 20) == learning_rate(config, STEPS, 39) == pytest.approx(1e-5)


def test_learning_rate_constant_stays_after_warmup():
    config = OptimizerConfig(lr=LR, warmup_steps=4, decay="constant")
    assert [learning_rate(config, STEPS, step) for step in (0, 2, 4, 39)] == pytest.approx([0, LR / 2, LR, LR])


@pytest.mark.parametrize("shape", ["polynomial", "cosine", "1-sqrt"])
@pytest.mark.parametrize("min_lr", [0.0, 1e-5])
def test_learning_rate_with_a_stable_phase_equals_transformers(shape, min_lr):
    start, theirs_name = 25, "linear" if shape == "polynomial" else shape
    config = OptimizerConfig(lr=LR, min_lr=min_lr, warmup_steps=WARMUP, decay=shape, decay_start=start)
    given = {"num_decay_steps": STEPS - start, "num_stable_steps": start - WARMUP, "min_lr_ratio": min_lr / LR}
    theirs = _theirs(lambda o: get_wsd_schedule(o, WARMUP, decay_type=theirs_name, **given))
    ours = [learning_rate(config, STEPS, step) for step in range(STEPS + 5)]
    # Their warm-up begins at the minimum, that of the other schedules and ours at 0.
    assert ours[WARMUP:] == pytest.approx(theirs[WARMUP:], rel=1e-12, abs=1e-18)
    assert ours[WARMUP:start] == [LR] * (start - WARMUP)


def test_learning_rate_inverse_sqrt_equals_transformers_down_to_its_minimum():
    config = OptimizerConfig(lr=LR, warmup_steps=WARMUP, decay="inverse_sqrt")
    theirs = _theirs(lambda o: get_inverse_sqrt_schedule(o, WARMUP))
    assert [learning_rate(config, STEPS, step) for step in range(STEPS + 5)] == pytest.approx(theirs, rel=1e-12)
    floor = config.model_copy(update={"min_lr": LR / 2})
    assert learning_rate(floor, STEPS, 4 * WARMUP - 1) > learning_rate(floor, STEPS, 1000 * WARMUP) == LR / 2


STABLE = ["optimizer.decay=constant", "optimizer.warmup_steps=10", "train.steps=100"]
COOLED = ["optimizer.decay=1-sqrt", "optimizer.decay_start=60", *STABLE[1:]]


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        (STABLE, COOLED, 61),  # the decay starts at lr
        (COOLED, STABLE, 61),
        (COOLED, [*COOLED[:-1], "train.steps=200"], 61),
        (STABLE, [*STABLE[:-1], "train.steps=200"], None),
        (STABLE, [*STABLE, "optimizer.lr=3e-4"], 1),  # update 0 of the warm-up has a rate of 0 in both
        (STABLE, [*STABLE, "optimizer.warmup_steps=20"], 1),
        (STABLE, [*STABLE, "optimizer.min_lr=1e-5"], None),
        (COOLED, [*COOLED, "optimizer.decay_steps=100"], None),
    ],
)
def test_first_changed_rate_is_the_first_update_whose_rate_differs(old, new, first):
    before, after = (load_run_config(None, settings) for settings in (old, new))
    assert first_changed_rate(before, after, 200) == first
    assert first is None or first_changed_rate(before, after, first) is None
