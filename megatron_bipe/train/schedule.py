"""Learning rate schedule: a pure function of the step, without state to save."""

import math

from megatron_bipe.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, total_steps: int, step: int) -> float:
    """Return the learning rate of update `step` (from 0), equal to transformers' schedules of the same names.

    Args:
        config: peak and minimum rate, warm-up and shape.
        total_steps: end of the decay if `config.decay_steps` is not set.
        step: number of updates done so far.

    Returns:
        The rate of the next update; 0 for the first one with warm-up, as in transformers.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    end = config.decay_steps or total_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    left = (1 - done) ** config.decay_power if config.decay == "polynomial" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left
