"""How many inference workers a run needs: as many as it takes for the trainers not to wait, and no more.

Two shares of time, measured over a window, say which pool waits for the other:

    starvation     training waits for samples          -> with n workers it has (1 - starvation) of what it could train
    backpressure   workers wait for credits or window  -> (1 - backpressure) of n would do

The gap between the two thresholds is the hysteresis; after each move nothing is decided until the pool has had the new
size for a while, because a new engine loads its model first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

STARVED = 0.1
"""Training waits for more than this share of the time: too few workers."""
FED = 0.02
"""It waits for less than this share: maybe too many."""
SPARE = 0.15
"""Share of the remaining workers' time that must be left over after one has gone."""
COOL_DOWN_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Load:
    """A window's measurements."""

    workers: int
    """That have been at work all through it."""
    starvation: float
    backpressure: float


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the pool's size."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Move:
    """A new size, and why."""

    workers: int
    reason: str


def decide(load: Load, limits: Limits) -> Move | None:
    """What a pool of ``load.workers`` should become; None to stay as it is.

    Growing aims at the size that would feed the trainers if production grows with the workers, at most twice the
    present one; shrinking goes one at a time.
    """
    n = load.workers
    if load.starvation > STARVED and load.starvation > load.backpressure:
        needed = math.ceil(n / max(0.5, 1 - load.starvation))
        workers = min(max(n + 1, needed), limits.most)
        if workers > n:
            return Move(workers, f"training waits for samples {load.starvation:.0%} of the time")
    elif load.starvation < FED and n * (1 - load.backpressure) <= (n - 1) * (1 - SPARE) and n > limits.least:
        return Move(n - 1, f"workers wait for room {load.backpressure:.0%} of the time, and training for none")
    return None
