"""The learning rate as a function of the step, through resumes that change how many steps a run has.

A rate that depends on the share of steps done would jump at such a resume. Instead the rest of the way is gone in the
steps that are left: the rate goes on where it was, and comes to its end with the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchspec.config.schema import OptimizerConfig

SPENT = 0.02
"""Of the peak: with less there is nothing left to stretch."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Saved with each checkpoint.

    Args:
        bends: a step, and the step that the way leads to from there on; the first is 0 and the steps of the run.
    """

    bends: tuple[tuple[int, int], ...]

    @property
    def total(self) -> int:
        """The step at which it ends."""
        return self.bends[-1][1]

    def bent(self, step: int, total: int, config: OptimizerConfig) -> Schedule:
        """The schedule of a run that goes on after ``step`` to ``total`` steps; this one if it was to anyway.

        Raises:
            ValueError: the rate has come to its end, and more steps with it would teach nothing.
        """
        if total == self.total:
            return self
        bent = Schedule((*(bend for bend in self.bends if bend[0] < step), (step, total)))
        if total > max(step, self.total) and (rate := bent.rate(step + 1, config)) < SPENT * config.lr:
            raise ValueError(
                f"training.epochs, training.max_steps: the learning rate has come to its end ({rate:.1e}) in the "
                f"{self.total:,} steps that this run had, so {total:,} would teach nothing: start a new run with "
                "training.init_from, go on from an earlier checkpoint (torchspec resume --from STEP), or set "
                "optimizer.min_lr_ratio"
            )
        return bent

    def rate(self, step: int, config: OptimizerConfig) -> float:
        """Of optimizer step ``step``, which lies after the last bend."""
        first, way = self.bends[0][1], 0.0  # way: in steps of a run that nobody has changed
        ends = [*(bend for bend, _ in self.bends[1:]), step]
        for (start, total), end in zip(self.bends, ends, strict=True):
            way += (end - start) * (first - way) / (total - start)
        return learning_rate(way, first, config)


def learning_rate(step: float, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step ``step`` (the first is 1; fractions lie between steps) of ``total_steps``.

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
