"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from torchspec.config.schema import OptimizerConfig


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step ``step`` (the first is 1) of ``total_steps``.

    Warm-up rises linearly and reaches ``lr`` at its last step. The decay begins at ``lr`` and would reach
    ``lr * min_lr_ratio`` one step after the last, so that no step is wasted on a rate of zero. Steps beyond
    ``total_steps`` stay at the end of the schedule. ``wsd`` is warm-up, stable, decay (MiniCPM, arXiv 2404.06395).
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step <= warmup:
        return config.lr * step / warmup
    decay_start = warmup
    if config.schedule == "wsd":
        decay_start = max(warmup, total_steps - math.ceil(config.decay_ratio * total_steps))
    progress = (step - 1 - decay_start) / max(1, total_steps - decay_start)
    progress = min(1.0, max(0.0, progress))
    if config.schedule == "constant":
        height = 1.0
    elif config.schedule == "cosine":
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        height = 1.0 - progress
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * height)
