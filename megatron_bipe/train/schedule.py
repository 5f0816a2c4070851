"""Learning rate schedule: a pure function of the step, without state to save.

    warm-up           from 0 up to lr, linear, during warmup_steps
    stable phase      lr, until decay_start; none by default
    decay             from lr down to min_lr, which is reached at decay_steps and then kept

`constant` ends with the stable phase, and `inverse_sqrt` falls without an end from the end of the warm-up on.

Source of 1-sqrt: Hägele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations".
"""

import math

from megatron_bipe.config import OptimizerConfig, RunConfig


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
    if config.decay == "constant" or step < (config.decay_start or 0):
        return config.lr
    if config.decay == "inverse_sqrt":
        return max(config.min_lr, config.lr * math.sqrt(config.warmup_steps / step))
    start = config.warmup_steps if config.decay_start is None else config.decay_start
    end = config.decay_steps or total_steps
    progress = min(1.0, (step - start) / max(1, end - start))
    return config.min_lr + (config.lr - config.min_lr) * _left(config, progress)


def _left(config: OptimizerConfig, progress: float) -> float:
    """Return the fraction of lr - min_lr that is left after this fraction of the decay."""
    if config.decay == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if config.decay == "1-sqrt":
        return 1 - math.sqrt(progress)
    return float((1 - progress) ** config.decay_power)


def first_changed_rate(old: RunConfig, new: RunConfig, num_updates: int) -> int | None:
    """Return the first of `num_updates` updates (from 0) that has another rate in `new`; None if all are the same."""
    if (old.optimizer, old.train.steps) == (new.optimizer, new.train.steps):
        return None
    for step in range(num_updates):
        was, now = (learning_rate(run.optimizer, run.train.steps, step) for run in (old, new))
        if was != now:
            return step
    return None
