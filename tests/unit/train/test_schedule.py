"""The learning rate against transformers' schedulers of the same names."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_polynomial_decay_schedule_with_warmup

from megatron_bipe.config import OptimizerConfig
from megatron_bipe.train.schedule import learning_rate

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
