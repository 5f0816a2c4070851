"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from megatron_bipe.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, total_steps: int, step: int) -> float:
    """Learning rate of update `step` (the first is 0), equal to transformers' schedules of the same names.

    Args:
        config: peak, floor, warm-up and shape.
        total_steps: end of the decay where `config.decay_steps` does not say otherwise.
        step: updates done so far.

    Returns:
        The rate of the next update; 0 for the very first one of a run with warm-up, as in transformers.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    end = config.decay_steps or total_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    left = (1 - done) ** config.decay_power if config.decay == "polynomial" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left
